"""Django: models, atomic blocks and iterators, a connection for each thread."""

import os

import django
from django.conf import settings
from rounds import SCHEMA, run

settings.configure(
    DATABASES={"default": {"ENGINE": "django.db.backends.postgresql", "NAME": os.environ["PGDATABASE"], "OPTIONS": {"server_side_binding": True}, "CONN_MAX_AGE": None}},
    USE_TZ=True,
    TIME_ZONE="UTC",
)
django.setup()

from django.db import IntegrityError, connection, models, transaction  # noqa: E402
from django.db.models import Count, Sum  # noqa: E402


class Item(models.Model):
    worker = models.IntegerField()
    round = models.IntegerField()
    note = models.TextField()

    class Meta:
        app_label = "frameworks"
        db_table = "item"
        constraints = [models.UniqueConstraint(fields=["worker", "round"], name="once")]


def prepare():
    with connection.cursor() as cursor:
        cursor.execute(f"drop schema if exists {SCHEMA} cascade")
        cursor.execute(f"create schema {SCHEMA}")
        cursor.execute(f"set search_path = {SCHEMA}")
    with connection.schema_editor() as editor:
        editor.create_model(Item)
    connection.close()


def work(session):
    with connection.cursor() as cursor:
        for name, value in session.settings.items():
            cursor.execute(f"set {name} = '{value}'")
    for round in session.rounds():
        one_round(session, round)
    connection.close()


def one_round(session, round):
    with connection.cursor() as cursor:
        for name, value in session.settings.items():
            cursor.execute("select current_setting(%s)", [name])
            session.equal(name, cursor.fetchone(), (value,))
    own = Item.objects.filter(worker=session.worker)
    if round == 0:
        own.delete()
    with transaction.atomic():
        Item.objects.create(worker=session.worker, round=round, note=session.note(round))
        try:
            with transaction.atomic():
                Item.objects.create(worker=session.worker, round=round, note="twice")
            session.equal("a key is", "inserted twice", "unique")
        except IntegrityError:
            pass
        found = own.aggregate(Count("id"), Sum("round"))
        session.equal("rows", (found["id__count"], found["round__sum"]), session.count(round))
    with transaction.atomic():
        with connection.cursor() as cursor:
            cursor.execute("set local statement_timeout = '77s'")
        own.select_for_update().first()
        own.update(note="undone")
        transaction.set_rollback(True)
    # A cursor WITH HOLD, as no transaction is open.
    notes = [item.note for item in own.order_by("round").iterator(chunk_size=20)]
    session.equal("notes", notes, [session.note(it) for it in range(round + 1)])


run(prepare, work)
