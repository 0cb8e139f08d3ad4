"""Looking at a running server from a terminal: `afd top`, `afd report`, `afd trace`. It only asks over HTTP; what it is told is the server's."""
