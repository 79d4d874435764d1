// Vercel's resumable-stream on Redis: viewers resume a stream that this process produces.
// usage: node resumable_stream.mjs <node_modules> <port> <redis url> <tokens> <rate>
// GET /viewers: another viewer; GET /start: begin to speak (the packages hold the whole text in memory).
import http from 'node:http'
import { createRequire } from 'node:module'

const [modules, port, url, tokens, rate] = process.argv.slice(2)
const require = createRequire(modules + '/')
const { createResumableStreamContext } = require('resumable-stream')
const { createClient } = require('redis')

const publisher = createClient({ url })
const subscriber = createClient({ url })
await Promise.all([publisher.connect(), subscriber.connect()])
const streams = createResumableStreamContext({ waitUntil: null, publisher, subscriber })

const speak = () =>
  new ReadableStream({
    async start(controller) {
      await new Promise((resolve) => (globalThis.begin = resolve))
      const started = performance.now()
      for (let said = 0; said < Number(tokens); ) {
        const due = Math.min(Number(tokens), Math.floor(((performance.now() - started) * rate) / 1000) + 1)
        for (; said < due; said++) {
          const data = `{"ts":${Date.now()},"turn":1,"text":"~${said} "}`
          controller.enqueue(`id: ${said}\nevent: text.delta\ndata: ${data}\n\n`)
        }
        await new Promise((resolve) => setTimeout(resolve, Math.max(0, started + (said * 1000) / rate - performance.now())))
      }
      controller.close()
    },
  })

const producer = (await streams.resumableStream('load', speak)).getReader()
const drain = async () => { while (!(await producer.read()).done); }
drain()

http
  .createServer(async (request, response) => {
    if (request.url === '/start') {
      globalThis.begin()
      return response.end('ok')
    }
    const stream = await streams.resumeExistingStream('load')
    response.writeHead(200, { 'content-type': 'text/event-stream' })
    response.write('event: open\ndata: {}\n\n')
    const reader = stream.getReader()
    for (let piece; !(piece = await reader.read()).done; ) {
      if (!response.write(piece.value)) await new Promise((resolve) => response.once('drain', resolve))
    }
    response.end()
  })
  .listen({ port: Number(port), host: '127.0.0.1', backlog: 4096 })
