"""A stranger with nothing but gRPC finds the way: health, reflection, and a call made from what it says."""

from __future__ import annotations

from typing import Any

import grpc
import pytest
from google.protobuf import descriptor_pool, json_format, message_factory
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase


@pytest.fixture(params=["agent", "collector"])
def place(request: pytest.FixtureRequest, house: Any) -> tuple[str, str, str, str]:
    """Address, service, a method that asks nothing, and a field that its answer has."""
    if request.param == "agent":
        return house.agent.address, "boardbench.v1.AgentService", "Describe", "agent_version"
    return house.collector.address, "boardbench.v1.CollectorService", "ListDevices", "devices"


def test_health(place: tuple[str, str, str, str]) -> None:
    address, service, _, _ = place
    with grpc.insecure_channel(address) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        for name in ("", service):
            answer = stub.Check(health_pb2.HealthCheckRequest(service=name), timeout=20)
            assert answer.status == health_pb2.HealthCheckResponse.SERVING
        with pytest.raises(grpc.RpcError) as refused:
            stub.Check(health_pb2.HealthCheckRequest(service="nothing.like.it"), timeout=20)
        assert refused.value.code() == grpc.StatusCode.NOT_FOUND


def test_reflection_lists_and_describes_the_service(place: tuple[str, str, str, str], house: Any) -> None:
    address, service, method, field = place
    with grpc.insecure_channel(address) as channel:
        database = ProtoReflectionDescriptorDatabase(channel)
        assert {service, "grpc.health.v1.Health"} <= set(database.get_services())
        pool = descriptor_pool.DescriptorPool(database)
        found = pool.FindServiceByName(service)
        called = found.FindMethodByName(method)
        request = message_factory.GetMessageClass(called.input_type)
        response = message_factory.GetMessageClass(called.output_type)
        call = channel.unary_unary(
            f"/{service}/{method}",
            request_serializer=request.SerializeToString,
            response_deserializer=response.FromString,
        )
        answer = json_format.MessageToDict(call(request(), timeout=20), preserving_proto_field_name=True)
        assert field in answer
