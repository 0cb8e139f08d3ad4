"""The HTTP front-end: OpenAI's routes, in and out.

A request's way: `protocol` says what a body may hold, `admission` turns it into generation requests, `generation` runs
them and turns tokens into pieces of text, `responses` and `streaming` write the answer. `errors` gives every refusal
OpenAI's form, `app` joins the routes, `server` owns the port and the signals. Which replica computes is not known here.
"""
