"""llama.cpp's own quantiser, by the wheel `cyllama`: the types that the `gguf` package cannot write. It may end its whole
process, and prints, so it runs as a process of its own:

python -P exporting/quantize_gguf.py whole.gguf small.gguf q4_k_m
"""

import sys

from cyllama.llama.llama_cpp import LlamaModelQuantizeParams, model_quantize

TYPES = {"q4_k_m": 15}  # llama.cpp's enum llama_ftype


def main(path: str, output: str, precision: str) -> None:
    params = LlamaModelQuantizeParams()
    params.ftype = TYPES[precision]
    model_quantize(path, output, params)


if __name__ == "__main__":
    main(*sys.argv[1:])
