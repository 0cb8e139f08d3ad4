"""What a running server tells of itself: log lines, Prometheus metrics, traces, and who is slow. Decides nothing."""
