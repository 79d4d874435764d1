// The Restate service of the steps scenario: ten steps, one after another; marks as loadtests/marks.py has them.
// Environment: LOADTEST_NODE_MODULES (a folder with @restatedev/restate-sdk), LOADTEST_MARKS, LOADTEST_PORT.
import { openSync, writeSync } from 'node:fs';
import { createRequire } from 'node:module';
import { join } from 'node:path';
import { performance } from 'node:perf_hooks';

const require = createRequire(join(process.env.LOADTEST_NODE_MODULES, 'index.js'));
const restate = require('@restatedev/restate-sdk');

const marks = openSync(process.env.LOADTEST_MARKS, 'a');
const mark = (kind, number) =>
  writeSync(marks, `${kind} ${number} ${((performance.timeOrigin + performance.now()) / 1000).toFixed(6)}\n`);

const add = async (number) => number;

async function tenSteps(ctx, number) {
  mark('s', number);
  let total = 0;
  for (let i = 0; i < 10; i++) total += await ctx.run('add', () => add(number + i));
  mark('e', number);
  return total;
}

const service = restate.service({ name: 'steps', handlers: { ten: tenSteps } });
await restate.serve({ services: [service], port: Number(process.env.LOADTEST_PORT) });
console.log('ready');
