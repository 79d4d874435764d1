// BullMQ's two sides: `enqueue <warmup> <jobs>` prints its timing as JSON, `worker` runs until it is killed.
// Environment: LOADTEST_REDIS_URL, LOADTEST_NODE_MODULES (a folder with bullmq and ioredis).
import { createRequire } from 'node:module';
import { join } from 'node:path';
import { performance } from 'node:perf_hooks';

const require = createRequire(join(process.env.LOADTEST_NODE_MODULES, 'index.js'));
const { Queue, Worker } = require('bullmq');

const QUEUE = 'noop';
const BULK = 1000;
const CONCURRENCY = Number(process.env.LOADTEST_CONCURRENCY ?? 100);
const { hostname, port } = new URL(process.env.LOADTEST_REDIS_URL);
const connection = { host: hostname, port: Number(port), maxRetriesPerRequest: null };

async function add(queue, count) {
  for (let from = 0; from < count; from += BULK) {
    const size = Math.min(BULK, count - from);
    await queue.addBulk(Array.from({ length: size }, (_, i) => ({ name: 'noop', data: { n: from + i } })));
  }
}

async function enqueue(warmup, jobs) {
  const queue = new Queue(QUEUE, { connection });
  await queue.waitUntilReady();
  await add(queue, warmup);
  const started = performance.now();
  await add(queue, jobs);
  const seconds = (performance.now() - started) / 1000;
  await queue.close();
  console.log(JSON.stringify({ jobs, seconds }));
}

async function work() {
  const worker = new Worker(QUEUE, async () => {}, { connection, concurrency: CONCURRENCY });
  worker.on('error', (error) => console.error(error));
  await worker.waitUntilReady();
}

const [mode, warmup, jobs] = process.argv.slice(2);
if (mode === 'enqueue') await enqueue(Number(warmup), Number(jobs));
else await work();
