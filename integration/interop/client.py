"""A workload in Python, built on the package spiffe alone. It prints one JSON
object about what the Workload API gave it: `client.py refused` before it has an
entry, `client.py served` with one, until its X509-SVID was replaced.
"""

import contextlib
import json
import queue
import sys

import grpc
from google.rpc import error_details_pb2
from grpc_status import rpc_status
from spiffe import WorkloadApiClient
from spiffe._proto import workload_pb2, workload_pb2_grpc
from spiffe.errors import PySpiffeError

AUDIENCE = "orders"
TIMEOUT = 60  # seconds; the test ends sooner


def failure(call):
    """What a call of the package fails with: code, and reason in its details."""
    try:
        call()
    except PySpiffeError as err:
        return describe(err.__cause__)
    return {"code": "OK"}


def describe(err):
    found = {"code": err.code().name}
    st = rpc_status.from_call(err)
    for detail in st.details if st else []:
        info = error_details_pb2.ErrorInfo()
        if detail.Unpack(info):
            found["reason"], found["domain"] = info.reason, info.domain
    return found


def without_header(address):
    """The package always sends the header, so this is gRPC alone."""
    with grpc.insecure_channel(address) as channel:
        stub = workload_pb2_grpc.SpiffeWorkloadAPIStub(channel)
        try:
            next(stub.FetchX509SVID(workload_pb2.X509SVIDRequest(), timeout=TIMEOUT))
        except grpc.RpcError as err:
            return describe(err)
    return {"code": "OK"}


def refused(client):
    return {
        "no_header": without_header(client.get_spiffe_endpoint_socket()),
        "x509_svid": failure(lambda: client.fetch_x509_svid(timeout=TIMEOUT)),
        "x509_bundles": failure(lambda: client.fetch_x509_bundles(timeout=TIMEOUT)),
        "jwt_svid": failure(lambda: client.fetch_jwt_svid({AUDIENCE}, timeout=TIMEOUT)),
        "jwt_bundles": failure(lambda: client.fetch_jwt_bundles(timeout=TIMEOUT)),
        "validate": failure(lambda: client.validate_jwt_svid("a.b.c", AUDIENCE, timeout=TIMEOUT)),
    }


def served(client):
    updates = queue.Queue()
    stream = client.stream_x509_contexts(updates.put, updates.put, retry_connect=False)

    def following():
        update = updates.get(timeout=TIMEOUT)
        if isinstance(update, Exception):
            raise update
        return update.default_svid, update.x509_bundle_set

    first, bundles = following()
    roots = bundles.get_bundle_for_trust_domain(first.spiffe_id.trust_domain).x509_authorities
    leaf, intermediate = first.cert_chain
    leaf.verify_directly_issued_by(intermediate)
    intermediate.verify_directly_issued_by(next(r for r in roots if r.subject == intermediate.issuer))

    token = client.fetch_jwt_svid({AUDIENCE}, timeout=TIMEOUT)
    second = first
    while second.leaf.serial_number == first.leaf.serial_number:
        second, _ = following()
    stream.cancel()
    return {
        "spiffe_id": str(first.spiffe_id),
        "serials": [f"{svid.leaf.serial_number:x}" for svid in (first, second)],
        "x509_bundles": [b.trust_domain.name for b in client.fetch_x509_bundles(timeout=TIMEOUT).bundles],
        "jwt_bundles": [b.trust_domain.name for b in client.fetch_jwt_bundles(timeout=TIMEOUT).bundles],
        "jwt_svid": str(token.spiffe_id),
        "validated": str(client.validate_jwt_svid(token.token, AUDIENCE, timeout=TIMEOUT).spiffe_id),
        "other_audience": failure(lambda: client.validate_jwt_svid(token.token, "web", timeout=TIMEOUT)),
    }


with contextlib.closing(WorkloadApiClient()) as api:  # SPIFFE_ENDPOINT_SOCKET
    json.dump({"refused": refused, "served": served}[sys.argv[1]](api), sys.stdout)
