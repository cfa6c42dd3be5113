"""Every bound on a queue, cache, buffer or input, once.

A limit that a user may set has its default in `config.py`; here stand the caps that nothing may exceed. Each is
checked where memory would be spent and exported as the gauge `weft_limit{name=…}`. Reasons stand beside the numbers.
"""

from dataclasses import asdict, dataclass


@dataclass(frozen=True, slots=True)
class Limits:
    """Units are in the names; a plain count has none."""

    # HTTP, before parsing. Sizes follow what common edge proxies accept.
    max_header_bytes: int = 32 * 1024
    max_headers: int = 100
    header_timeout_s: float = 10.0
    max_json_depth: int = 64
    max_json_containers: int = 65_536
    max_url_bytes: int = 8 * 1024
    linger_s: float = 10.0
    linger_idle_s: float = 0.5

    # One request.
    max_n: int = 32
    max_stop_sequences_cap: int = 16
    max_stop_sequence_chars: int = 256
    max_logit_bias_entries: int = 1024
    max_top_n_tokens_cap: int = 20
    max_messages: int = 2048
    max_embedding_inputs: int = 2048
    max_request_id_chars: int = 128

    # Chat templates: rendered in a worker that can be killed.
    max_template_output_bytes: int = 4 * 1024 * 1024
    template_timeout_s: float = 1.0
    template_queue_timeout_s: float = 10.0
    template_memory_bytes: int = 512 * 1024 * 1024
    template_compile_timeout_s: float = 10.0
    num_template_workers: int = 2

    # Streams: a reader that stops reading may cost this much and no more.
    max_stream_buffer_events: int = 512
    max_stream_buffer_bytes: int = 256 * 1024
    stream_stall_timeout_s: float = 30.0

    # Stored responses: dropped oldest first beyond either bound.
    max_stored_responses: int = 100_000
    max_stored_response_bytes: int = 1024 * 1024 * 1024

    # Engine.
    max_queue_requests: int = 1024
    max_num_sequences: int = 256
    queue_timeout_s: float = 60.0
    max_wire_message_bytes: int = 64 * 1024 * 1024
    max_frame_backlog_bytes: int = 16 * 1024 * 1024
    max_inbox_messages: int = 4096

    # Files that came from elsewhere.
    max_config_file_bytes: int = 16 * 1024 * 1024
    max_tokenizer_file_bytes: int = 256 * 1024 * 1024
    max_safetensors_header_bytes: int = 100 * 1024 * 1024
    max_template_chars: int = 1024 * 1024
    max_gguf_keys: int = 4096
    max_gguf_key_bytes: int = 1024
    max_gguf_array_length: int = 16_000_000

    # Telemetry.
    max_recording_queue_lines: int = 256
    max_label_values: int = 512
    max_trace_queue_spans: int = 4096
    max_trace_batch_spans: int = 512
    trace_interval_s: float = 2.0
    trace_export_timeout_s: float = 10.0
    trace_flush_s: float = 1.0

    def as_dict(self) -> dict[str, float]:
        """Name → number, for the metrics page and the documentation."""
        return asdict(self)


LIMITS = Limits()
