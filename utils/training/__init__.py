"""The former home of training's modules. CHANGELOG.md maps the old names to the new ones."""

raise SystemExit(
    "utils.training has moved to `python -m utils.checkpoints` and `python -m training.launch`; see CHANGELOG.md"
)
