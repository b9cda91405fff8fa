"""The former home of training's modules. CHANGELOG.md maps the old names to the new ones."""

raise SystemExit("utils.training has moved: see `python -m utils.checkpoints`, `training.launch` and CHANGELOG.md")
