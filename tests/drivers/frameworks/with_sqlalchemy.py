"""SQLAlchemy: the ORM with a pool, on psycopg."""

from rounds import SCHEMA, WORKERS, run
from sqlalchemy import Column, Integer, String, UniqueConstraint, create_engine, event, func, select, text, update
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session, declarative_base

Base = declarative_base()
engine = create_engine("postgresql+psycopg://", pool_size=WORKERS, connect_args={"prepare_threshold": 1})


class Item(Base):
    __tablename__ = "item"
    __table_args__ = (UniqueConstraint("worker", "round"),)
    id = Column(Integer, primary_key=True)
    worker = Column(Integer)
    round = Column(Integer)
    note = Column(String)


@event.listens_for(engine, "connect")
def connect(connection, _record):
    connection.autocommit = True
    connection.execute(f"set search_path = {SCHEMA}")
    connection.autocommit = False


def prepare():
    with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        connection.execute(text(f"drop schema if exists {SCHEMA} cascade"))
        connection.execute(text(f"create schema {SCHEMA}"))
    Base.metadata.create_all(engine)


def work(session):
    for round in session.rounds():
        one_round(session, round)


def one_round(session, round):
    own = Item.worker == session.worker
    # Which connection it is, the pool decides; a commit of the session alone would return it.
    with engine.connect() as connection, Session(connection) as orm:
        for name, value in session.settings.items():
            orm.execute(text(f"set {name} = '{value}'"))
        orm.commit()
        for name, value in session.settings.items():
            session.equal(name, orm.scalar(text("select current_setting(:name)"), {"name": name}), value)
        if round == 0:
            for item in orm.scalars(select(Item).where(own)):
                orm.delete(item)
            # A flush inserts before it deletes.
            orm.flush()
        orm.add(Item(worker=session.worker, round=round, note=session.note(round)))
        orm.flush()
        try:
            with orm.begin_nested():
                orm.add(Item(worker=session.worker, round=round, note="twice"))
            session.equal("a key is", "inserted twice", "unique")
        except IntegrityError:
            pass
        session.equal("rows", tuple(orm.execute(select(func.count(), func.sum(Item.round)).where(own)).one()), session.count(round))
        orm.commit()
        orm.execute(text("set local statement_timeout = '77s'"))
        orm.execute(update(Item).where(own).values(note="undone"))
        orm.rollback()
        session.equal("timeout", orm.scalar(text("show statement_timeout")), session.settings["statement_timeout"])
        notes = list(orm.scalars(select(Item.note).where(own).order_by(Item.round).execution_options(stream_results=round % 10 == 0)))
        session.equal("notes", notes, [session.note(it) for it in range(round + 1)])


run(prepare, work)
