"""libpq as an application uses it: the same client for every way to the server."""

import ctypes
import ctypes.util
import time

_lib = ctypes.CDLL(ctypes.util.find_library("pq") or "libpq.so.5")
for name, result, arguments in [
    ("PQconnectdb", ctypes.c_void_p, [ctypes.c_char_p]),
    ("PQstatus", ctypes.c_int, [ctypes.c_void_p]),
    ("PQerrorMessage", ctypes.c_char_p, [ctypes.c_void_p]),
    ("PQexec", ctypes.c_void_p, [ctypes.c_void_p, ctypes.c_char_p]),
    ("PQresultStatus", ctypes.c_int, [ctypes.c_void_p]),
    ("PQclear", None, [ctypes.c_void_p]),
    ("PQfinish", None, [ctypes.c_void_p]),
]:
    function = getattr(_lib, name)
    function.restype, function.argtypes = result, arguments


class Session:
    """One connection."""

    def __init__(self, conninfo):
        self._connection = _lib.PQconnectdb(conninfo.encode())
        if _lib.PQstatus(self._connection) != 0:
            message = _lib.PQerrorMessage(self._connection).decode().strip()
            self.close()
            raise ConnectionError(message)

    def execute(self, sql):
        result = _lib.PQexec(self._connection, sql)
        good = _lib.PQresultStatus(result) in (1, 2)
        _lib.PQclear(result)
        if not good:
            raise RuntimeError(_lib.PQerrorMessage(self._connection).decode().strip())

    def time_round_trips(self, count, sql=b"SELECT 1"):
        """Seconds that each took."""
        taken = []
        clock, execute, status, clear = time.perf_counter, _lib.PQexec, _lib.PQresultStatus, _lib.PQclear
        connection = self._connection
        for _ in range(count):
            began = clock()
            result = execute(connection, sql)
            taken.append(clock() - began)
            if status(result) != 2:
                raise RuntimeError(_lib.PQerrorMessage(connection).decode().strip())
            clear(result)
        return taken

    def close(self):
        _lib.PQfinish(self._connection)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()
