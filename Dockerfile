# A GPU machine: docker build -t secateur . && docker run --gpus all -v $PWD/runs:/secateur/runs secateur
# Not built in CI.
FROM nvidia/cuda:13.0.1-base-ubuntu24.04
RUN apt-get update && apt-get install -y --no-install-recommends git python3 python3-venv && rm -rf /var/lib/apt/lists/*
WORKDIR /secateur
COPY . .
RUN python3 -m venv /venv && /venv/bin/python -m pip install --no-cache-dir -c constraints.txt -e .
ENTRYPOINT ["/venv/bin/python", "train.py"]
