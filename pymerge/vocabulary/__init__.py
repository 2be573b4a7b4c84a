"""The tokens of a merged model: which tokenizer it gets, and the embedding and head rows of each model in its order."""
