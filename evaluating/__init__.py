"""How good is a model, and is it better than another? What evaluate.py alone uses: the models, the texts, the losses of
their documents, intervals, tables, tasks."""
