"""The former home of training's modules. CHANGELOG.md maps the old names to the new ones."""

raise SystemExit(
    "utils.training has moved: `python -m utils.checkpoints list|verify RUN` and `python -m training.launch FILE` "
    "replace its commands, and CHANGELOG.md maps its modules"
)
