"""Print the last lines of `make demo`: the results, where to look, and what the model writes."""

import json
import sys
import textwrap
from pathlib import Path

sys.stdout.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]  # what a model writes may be any text
for name in ("runs/demo/summary.json", "runs/demo/evaluation.json", "exports/demo/export_report.json"):
    if not Path(name).is_file():
        sys.exit(f"demo_summary.py: error: {name} does not exist; this shows the results of: make demo")
run = json.loads(Path("runs/demo/summary.json").read_text(encoding="utf-8"))
scored = json.loads(Path("runs/demo/evaluation.json").read_text(encoding="utf-8"))
exported = json.loads(Path("exports/demo/export_report.json").read_text(encoding="utf-8"))
options = scored["options"]

print(f"""
What came out
  loss on held-out text     {scored["loss"]:.4f} nats per token (step {exported["optimizer_step"]})
  perplexity                {scored["perplexity"]:.2f}
  bits per byte             {scored["bits_per_byte"]:.3f}   (xz -9 on the same text: {scored["xz_bits_per_byte"]:.3f})
  training speed            {run["tokens_per_second"]:,.0f} tokens per second
  export                    largest logit difference {exported["max_logit_difference"]:.1e}
Where to look
  data/demo/report.html     which documents were kept or dropped, and why
  runs/demo/report.html     curves, what the model wrote during training, and the commands to go on
  exports/demo              opens with transformers' AutoModelForCausalLM.from_pretrained
What it writes after {options["prompt"]!r} (seed {options["seed"]}, temperature {options["temperature"]})
{textwrap.indent(scored["text"].strip(), "  ")}
Expect the form of an entry and some grammar, but no sense: {run["parameters"] / 1e6:.1f} million parameters have read
{run["tokens_seen"] / 1e6:.2f} million tokens. Next: "Train on your own text" in README.md.""")
if not run["finished"]:
    print(f"Training was stopped ({run['reason']}); `make demo` continues it.")
print("Talk to it: python chat.py --model exports/demo")
