"""What becomes of a connection by each sslmode, with psycopg's own libpq; and the certificate that it is tried with.

    driver.py certificate DIRECTORY     an authority, and a certificate of it for `localhost`
    driver.py connect < CASES           a JSON list of connection parameters; prints a JSON list of the outcomes
"""

import datetime
import ipaddress
import json
import pathlib
import sys


def connect():
    import psycopg

    found = []
    for parameters in json.load(sys.stdin):
        try:
            with psycopg.connect(**parameters, user="anyone", connect_timeout=30) as connection:
                assert connection.execute("select 6 * 7").fetchone() == (42,)
                found.append("TLS" if connection.pgconn.ssl_in_use else "plain")
        except psycopg.OperationalError as error:
            found.append(f"refused: {error}")
    json.dump({"libpq": psycopg.pq.version(), "found": found}, sys.stdout)


def certificate(directory):
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    now = datetime.datetime.now(datetime.timezone.utc)

    def make(name, key, issuer, issuers_key, extensions):
        subject = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name)])
        builder = x509.CertificateBuilder(issuer or subject, subject, key.public_key(), x509.random_serial_number(), now - datetime.timedelta(hours=1), now + datetime.timedelta(days=1))
        for extension, critical in extensions:
            builder = builder.add_extension(extension, critical)
        return builder.sign(issuers_key, hashes.SHA256())

    authority_key, key = (ec.generate_private_key(ec.SECP256R1()) for _ in range(2))
    authority = make("sslmode test authority", authority_key, None, authority_key, [(x509.BasicConstraints(ca=True, path_length=0), True)])
    names = x509.SubjectAlternativeName([x509.DNSName("localhost"), x509.IPAddress(ipaddress.ip_address("::1"))])
    leaf = make("localhost", key, authority.subject, authority_key, [(names, False)])
    pem = serialization.Encoding.PEM
    (directory / "authority.crt").write_bytes(authority.public_bytes(pem))
    (directory / "tls.crt").write_bytes(leaf.public_bytes(pem) + authority.public_bytes(pem))
    (directory / "tls.key").write_bytes(key.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()))


if sys.argv[1] == "certificate":
    certificate(pathlib.Path(sys.argv[2]))
else:
    connect()
