"""Watching batch normalization while a model trains, from what its moving statistics do."""
