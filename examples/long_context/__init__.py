"""Parts of ``train_long_context.py``: the data, the model, the attention variants, the engines, the report and types of options."""
