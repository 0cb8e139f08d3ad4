"""The HTTP front-end: OpenAI's routes and Anthropic's, in and out, and the page.

A request's way: `request_ids` names it, `gate` asks for its key, `protocol` says what a body may hold, `gateways` make a chat of
other forms of one, `admission` turns it into generation requests, `respond` has `generation` run them and turn tokens into pieces
of text, of which `answers` and `streaming` make the answer. `errors` gives every refusal OpenAI's form, `app` joins the `routes`,
`server` owns the port and the signals. Which replica computes is not known here.
"""
