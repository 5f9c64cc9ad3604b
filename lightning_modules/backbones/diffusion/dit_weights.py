"""Fresh weights of a DiT as its paper draws them; diffusers leaves PyTorch's defaults."""

from typing import Any

from torch import nn

STD = 0.02
"""of the embedding tables and of the timestep's layers"""


def initialise(network: Any) -> None:
    """Draw the weights of a DiTTransformer2DModel anew, from the global generator: adaLN-Zero.

    As in arXiv 2212.09748, section 3.2, and its code: every block begins as the identity and the network's output as
    zero; other layers are Xavier-uniform, without bias. The patch embedding, a convolution, is drawn as a linear layer.
    """
    for module in network.modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            nn.init.xavier_uniform_(module.weight.view(len(module.weight), -1))
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    zero = [network.proj_out_1, network.proj_out_2]
    for block in network.transformer_blocks:
        embedder = block.norm1.emb
        for layer in (embedder.timestep_embedder.linear_1, embedder.timestep_embedder.linear_2):
            nn.init.normal_(layer.weight, std=STD)
        nn.init.normal_(embedder.class_embedder.embedding_table.weight, std=STD)
        zero.append(block.norm1.linear)
    for layer in zero:
        nn.init.zeros_(layer.weight)
