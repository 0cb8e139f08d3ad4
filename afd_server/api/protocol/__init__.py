"""The bodies that clients may send: every field of OpenAI's and vLLM's routes, served or refused by name.

What lives here: names, types and ranges, checked before anything else is done. What does not: what depends on the
model or on other fields (admission.py). Unknown fields are refused; so are known ones that are not served, unless they
hold a value that asks for nothing.
"""
