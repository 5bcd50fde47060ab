// Prisma: its client on node-postgres, with transactions that are interactive.
import assert from 'node:assert/strict';
import { PrismaPg } from '@prisma/adapter-pg';
import { PrismaClient } from '@prisma/client';
import { notesTo, run, sumTo } from './rounds.mjs';

const SCHEMA = 'of_prisma';
const prisma = new PrismaClient({ adapter: new PrismaPg({ max: 3 }, { schema: SCHEMA }), transactionOptions: { maxWait: 60_000, timeout: 60_000 } });
await prisma.$executeRawUnsafe(`drop schema if exists ${SCHEMA} cascade`);
await prisma.$executeRawUnsafe(`create schema ${SCHEMA} create table "Item" (id serial primary key, worker int not null, round int not null, note text not null, unique (worker, round))`);

await run(SCHEMA, async (session, round, equal) => {
  const { worker, settings } = session;
  if (round === 0) await prisma.item.deleteMany({ where: { worker } });
  await prisma.$transaction(async (tx) => {
    for (const [name, value] of Object.entries(settings)) {
      await tx.$executeRawUnsafe(`set local ${name} = '${value}'`);
      equal(name, await tx.$queryRaw`select current_setting(${name}) as value`, [{ value }]);
    }
    await tx.item.create({ data: { worker, round, note: session.note(round) } });
    const found = await tx.item.aggregate({ where: { worker }, _count: true, _sum: { round: true } });
    equal('rows', [found._count, found._sum.round], [round + 1, sumTo(round)]);
  });
  await assert.rejects(prisma.item.create({ data: { worker, round, note: 'twice' } }), { code: 'P2002' });
  const undone = prisma.$transaction(async (tx) => {
    await tx.item.updateMany({ where: { worker }, data: { note: 'undone' } });
    throw new Error('undo');
  }, { isolationLevel: 'Serializable' });
  await assert.rejects(undone, { message: 'undo' });
  const items = await prisma.item.findMany({ where: { worker }, orderBy: { round: 'asc' } });
  equal('notes', items.map((item) => item.note), notesTo(session, round));
});
await prisma.$disconnect();
