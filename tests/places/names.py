"""A name server for one test: configured answers, over UDP and TCP, on port 53 of a network of its own."""

import contextlib
import ipaddress
import socket
import struct
import threading

PORT = 53
A, AAAA = 1, 28
ANSWER, RECURSION, TRUNCATED, NO_SUCH_NAME = 0x8400, 0x0180, 0x0200, 3


@contextlib.contextmanager
def serving(names, only_tcp=()):
    """`names` to lists of addresses; those of `only_tcp` are cut short over UDP."""
    udp = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    tcp = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    with udp, tcp:
        for each in (udp, tcp):
            each.bind(("127.0.0.1", PORT))
        tcp.listen()
        for loop in (lambda: over_udp(udp, names, only_tcp), lambda: over_tcp(tcp, names)):
            threading.Thread(target=loop, daemon=True).start()
        yield


def over_udp(server, names, only_tcp):
    with contextlib.suppress(OSError):
        while True:
            query, client = server.recvfrom(512)
            server.sendto(answer(query, names, only_tcp), client)


def over_tcp(server, names):
    with contextlib.suppress(OSError):
        while True:
            client, _ = server.accept()
            with client, contextlib.suppress(ConnectionError):
                while len(length := client.recv(2, socket.MSG_WAITALL)) == 2:
                    reply = answer(client.recv(*struct.unpack("!H", length), socket.MSG_WAITALL), names, ())
                    client.sendall(struct.pack("!H", len(reply)) + reply)


def answer(query, names, only_tcp):
    """One question's (RFC 1035, section 4)."""
    labels, at = [], 12
    while length := query[at]:
        labels.append(query[at + 1 : at + 1 + length].decode())
        at += 1 + length
    name, end = ".".join(labels).lower(), at + 5
    (kind,) = struct.unpack("!H", query[at + 1 : at + 3])
    records = []
    for address in map(ipaddress.ip_address, names.get(name, ())):
        if kind == (A if address.version == 4 else AAAA):
            records.append(struct.pack("!HHHIH", 0xC00C, kind, 1, 60, len(address.packed)) + address.packed)
    flags = ANSWER | RECURSION | (0 if name in names else NO_SUCH_NAME)
    if name in only_tcp:
        records, flags = [], flags | TRUNCATED
    return query[:2] + struct.pack("!HHHHH", flags, 1, len(records), 0, 0) + query[12:end] + b"".join(records)
