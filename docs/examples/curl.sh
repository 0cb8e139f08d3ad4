#!/usr/bin/env bash
# The same over plain HTTP, with curl.
#
# Requests are JSON. An answer that streams comes as server-sent events, the last of which is `data: [DONE]`.
set -euo pipefail

url=${OPENAI_BASE_URL:-http://127.0.0.1:8000/v1}
key="Authorization: Bearer ${AFD_API_KEY:-none}"
json="Content-Type: application/json"

curl --silent --fail-with-body "$url/models" -H "$key"
echo

curl --silent --fail-with-body "$url/chat/completions" -H "$key" -H "$json" -d '{
  "messages": [{"role": "user", "content": "What is the capital of France?"}],
  "temperature": 0, "max_tokens": 20
}'
echo

curl --silent --fail-with-body --no-buffer "$url/completions" -H "$key" -H "$json" -d '{
  "prompt": "One, two, three,", "temperature": 0, "max_tokens": 8, "stream": true
}'
