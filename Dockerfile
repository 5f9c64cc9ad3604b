# A machine with NVIDIA GPUs. It is not built in CI.
#
#     docker build -t secateur .
#     docker run --gpus all --shm-size 8g -v "$PWD/runs:/secateur/runs" secateur experiment=... trainer=gpu
#
# Data and weights of the hub: -v /data:/data -e SECATEUR_DATA=/data -v ~/.cache/huggingface:/root/.cache/huggingface
FROM nvidia/cuda:13.0.1-base-ubuntu24.04
# Ubuntu 24.04 has Python 3.12; the wheels of torch bring their own CUDA libraries.
RUN apt-get update \
    && apt-get install -y --no-install-recommends git python3 python3-venv \
    && rm -rf /var/lib/apt/lists/*
WORKDIR /secateur
COPY . .
RUN python3 -m venv /venv \
    && /venv/bin/python -m pip install --no-cache-dir -c constraints.txt -e '.[hf,language,shards]'
ENTRYPOINT ["/venv/bin/python", "train.py"]
