"""Answers Health as a shard does; `python -m … SOCKET STALLED_NS`."""

import sys
from concurrent import futures

import grpc

from weft.proto.v1 import generate_pb2 as pb
from weft.proto.v1 import generate_pb2_grpc as pb_grpc


class Service(pb_grpc.GenerationServicer):
    def Health(self, request: pb.HealthRequest, context: grpc.ServicerContext) -> pb.HealthResponse:  # noqa: N802
        return pb.HealthResponse(is_ready=True, stalled_ns=int(sys.argv[2]))


def main() -> None:
    server = grpc.server(futures.ThreadPoolExecutor(2))
    pb_grpc.add_GenerationServicer_to_server(Service(), server)
    server.add_insecure_port(f"unix://{sys.argv[1]}")
    server.start()
    sys.stdout.write("up\n")
    sys.stdout.flush()
    server.wait_for_termination()


main()
