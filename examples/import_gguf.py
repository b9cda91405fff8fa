"""Convert a GGUF file to a transformers folder, for `--model.pretrained` and `--tokenizer.pretrained`.

    python examples/import_gguf.py MODEL.gguf models/mine          # needs pip install gguf

Quantised weights are converted to fp32.
"""

import argparse
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from utils.files import follow_umask


def read_options() -> argparse.Namespace:
    """Exit with one line for a mistake, before the slow imports."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, help="GGUF file to read")
    parser.add_argument("output", type=Path, help="folder to write")
    options = parser.parse_args()
    if not options.source.is_file():
        parser.error(f"{options.source} {'is no file' if options.source.exists() else 'does not exist'}")
    with options.source.open("rb") as file:
        if file.read(4) != b"GGUF":
            parser.error(f"{options.source} is not a GGUF file")
    if options.output.exists() and (not options.output.is_dir() or any(options.output.iterdir())):
        parser.error(f"{options.output} exists; remove it, or name another folder")
    if find_spec("gguf") is None:
        parser.error("the library gguf is missing: pip install gguf")
    return options


options = read_options() if __name__ == "__main__" else None

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer


def main(source: Path, output: Path) -> None:
    where: dict[str, Any] = {"pretrained_model_name_or_path": source.parent, "gguf_file": source.name}
    loaded = AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32)
    # Copy into a model without a quantization entry, because `save_pretrained` refuses to write a GGUF model.
    values = loaded.config.to_dict()
    values.pop("quantization_config", None)
    model = AutoModelForCausalLM.from_config(type(loaded.config).from_dict(values), dtype=torch.float32)
    model.load_state_dict(loaded.state_dict())
    model.save_pretrained(output)
    AutoTokenizer.from_pretrained(**where).save_pretrained(output)
    follow_umask(output)
    print(f"wrote {output}: {type(model).__name__}, {sum(p.numel() for p in model.parameters()):,} parameters")


if __name__ == "__main__":
    main(options.source, options.output)  # type: ignore[union-attr]
