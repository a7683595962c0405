"""Parts of `tools.train_tiny`: the tiny world, its tokenizer, the network, training, export and evaluation."""
