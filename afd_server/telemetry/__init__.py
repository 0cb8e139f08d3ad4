"""What a running server tells of itself: log lines and Prometheus metrics. Decides nothing."""
