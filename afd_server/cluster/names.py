"""What workers are called, everywhere: in logs, in metrics, and as Ray actors."""


def attention_name(index: int) -> str:
    return f"attention-{index}"


def ffn_name(index: int) -> str:
    return f"ffn-{index}"


def worker_name(role: str, index: int) -> str:
    return ffn_name(index) if role == "ffn" else attention_name(index)
