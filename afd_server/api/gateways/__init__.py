"""Other vendors' and newer forms of a conversation, as the chat that this server runs: one file for each.

What lives here: bodies into a ChatCompletionRequest, and the names of its fields back into the client's. What does not: the
answers (answers/).
"""
