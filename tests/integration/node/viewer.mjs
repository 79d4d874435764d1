// Watch one URL with an EventSource and print what it is told, a line of JSON each.
// The names of events to listen for are the arguments behind the URL.

import { EventSource } from 'eventsource'

const [url, ...names] = process.argv.slice(2)
const say = (line) => process.stdout.write(JSON.stringify(line) + '\n')

const source = new EventSource(url)
source.onopen = () => say({ open: true })
source.onerror = (error) => {
  say({ error: error.code ?? null, state: source.readyState })
  if (source.readyState === EventSource.CLOSED) process.exit(0)
}
for (const name of names) {
  source.addEventListener(name, (event) => say({ id: event.lastEventId, event: name, data: event.data }))
}

setInterval(() => {}, 1000) // the package's own timer does not keep the process
