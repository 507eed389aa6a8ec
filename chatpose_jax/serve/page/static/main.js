import * as api from './api.js';
import { make, say, the } from './dom.js';
import { imagesIn, read } from './pictures.js';
import { FRAMES, fromGlb, fromJson } from './rig.js';
import { Stage } from './stage.js';
import { Store } from './store.js';
import { asRequest, bodiesOf, draw, spoken } from './talk.js';

const EXAMPLES = [
  'Show me someone who kneels.',
  'A person squats. Both arms are held out to the sides. Give me the SMPL pose.',
  'Please raise both arms above the head.',
];
const ABOUT_A_PICTURE = 'What is the SMPL pose of this person?';
const SETTINGS = { force: false, temperature: 0, tokens: 256, samples: 1 };
/** Milliseconds from one look at the server to the next. */
const EVERY = { ready: 15_000, locked: 15_000, other: 2_000 };

const store = await Store.open();
/** @type {import('./talk.js').Message[]} */
let messages = (await store.conversation())?.messages ?? [];
for (const message of messages) {
  if (message.state === 'writing') Object.assign(message, { state: 'failed', fault: 'The page was closed before the answer was complete.' });
}
const settings = { ...SETTINGS, ...JSON.parse(localStorage.getItem('chatpose-settings') ?? '{}') };
let health = 'asking';
let running = null;
let pictures = [];
let shown = [];
let active = null;
let stage = null;
try {
  stage = new Stage(the('canvas'), the('labels'));
} catch {
  the('nothing').textContent = 'This browser shows no 3D here (WebGL is off): the server draws the bodies, from the front and from the side.';
  for (const id of ['canvas', 'corner']) the(id).hidden = true;
}

/** The address of a picture of a body that the server drew, where the browser cannot. */
const flat = {
  found: new Map(),
  of(body) {
    if (!this.found.has(body.id)) this.found.set(body.id, api.poseFile(body.id, 'png').then(URL.createObjectURL));
    return this.found.get(body.id);
  },
  async show(body, image) {
    try {
      image.src = await this.of(body);
      image.alt = `${body.label}, from the front and from the side`;
      image.hidden = false;
    } catch {
      this.found.delete(body.id);
    }
  },
};

// --- the server

const STATES = {
  asking: ['connecting', ''],
  ready: ['ready', ''],
  model_loading: ['loading', 'The model is being loaded. You can write your question meanwhile.'],
  stopping: ['stopping', 'The server is about to stop: it takes no new questions.'],
  gone: ['no answer', 'The server does not answer. Your conversation is kept here, and this page asks again every few seconds.'],
  locked: ['locked', ''],
};

function setHealth(state, words = STATES[state]?.[1] ?? '') {
  const before = health;
  health = state;
  the('health').dataset.state = state;
  the('health-text').textContent = STATES[state]?.[0] ?? 'not ready';
  const banner = the('banner');
  if (banner.dataset.words !== words) {
    banner.dataset.words = words;
    banner.replaceChildren(make('span', {}, words));
    if (state === 'locked') banner.append(make('button', { type: 'button', className: 'quiet', onclick: askForKey }, 'Enter the key'));
    banner.hidden = !words;
  }
  if (before === 'gone' && state !== 'gone') say('The server is back.');
  if (before !== 'ready' && state === 'ready') missing.clear();
  refreshComposer();
}

/** Bodies whose files could not be had because the server was away; they are asked for again when it is back. */
const missing = {
  ids: new Set(),
  clear() {
    const again = this.ids.size > 0;
    this.ids.forEach((id) => loaded.delete(id));
    this.ids.clear();
    if (again) redraw();
  },
};

let waiting = null;
async function watch() {
  clearTimeout(waiting);
  try {
    await api.health();
    if (health !== 'ready') {
      const [model] = await api.models();
      the('model').textContent = model.id;
      the('model').title = model.description ?? `Model: ${model.id}`;
      the('about').hidden = !model.description;
      the('about').textContent = model.description ? model.description[0].toUpperCase() + model.description.slice(1) : '';
    }
    setHealth('ready');
  } catch (error) {
    heard(error);
  }
  waiting = setTimeout(watch, EVERY[health] ?? EVERY.other);
}

/** Draws the conclusion from a failure: about the server, not about one answer. */
function heard(error) {
  if (!(error instanceof api.Failure)) throw error;
  if (error.gone) setHealth('gone');
  else if (error.status === 401) {
    if (health !== 'locked') askForKey();
    setHealth('locked', 'This server asks for a key.');
  } else if (error.status === 503 || error.code?.startsWith('wrong_')) setHealth(error.code in STATES ? error.code : 'failed', STATES[error.code]?.[1] ?? error.message);
}

function askForKey() {
  the('key-wrong').hidden = true;
  if (!the('key-dialog').open) the('key-dialog').showModal();
}

the('key-form').addEventListener('submit', async (event) => {
  event.preventDefault();
  api.key.set(the('key').value.trim());
  try {
    await api.models();
  } catch (error) {
    if (error.status === 401) {
      the('key-wrong').hidden = false;
      the('key').select();
      return;
    }
  }
  the('key').value = '';
  the('key-dialog').close();
  await watch();
  the('question').focus();
});

// --- asking

function refreshComposer() {
  const writing = running !== null;
  const anything = the('question').value.trim() || pictures.length;
  the('send').hidden = writing;
  the('stop').hidden = !writing;
  the('send').disabled = health !== 'ready' || !anything;
  the('question').placeholder = pictures.length ? ABOUT_A_PICTURE : EXAMPLES[messages.length ? 2 : 0];
  the('new').disabled = messages.length === 0;
}

async function ask() {
  const text = the('question').value.trim() || (pictures.length ? ABOUT_A_PICTURE : '');
  if (!text || running || health !== 'ready') return;
  messages.push({ role: 'user', text, pictures }, { role: 'assistant', text: '', poses: [], state: 'writing', fault: null });
  the('question').value = '';
  setPictures([]);
  grow();
  await write(messages.at(-1));
}

async function retry(message) {
  if (running || health !== 'ready') return say('The server is not ready.');
  // The question moves to the end, because what follows it was asked without it.
  const at = messages.indexOf(message);
  const [question] = messages.splice(at - 1, 2);
  Object.assign(message, { text: '', poses: [], state: 'writing', fault: null, finish: null });
  messages.push(question, message);
  return write(message);
}

async function write(message) {
  running = new AbortController();
  redraw();
  toEnd();
  say('The model is writing.');
  const body = { messages: asRequest(messages), max_tokens: settings.tokens, force_pose: settings.force, samples: settings.samples };
  if (settings.temperature > 0) Object.assign(body, { temperature: settings.temperature, seed: Math.floor(Math.random() * 2 ** 31) });
  try {
    for await (const delta of api.answer(body, running.signal)) {
      message.text += delta.content ?? '';
      if (delta.finish) message.finish = delta.finish;
      if (delta.poses) {
        message.poses.push(...delta.poses);
        display(bodiesOf(messages).filter((each) => each.message === message));
        save();
      }
      redrawOne(message);
    }
    message.state = 'done';
  } catch (error) {
    if (error.name === 'AbortError') message.state = message.text ? 'stopped' : 'failed';
    else message.state = 'failed';
    if (message.state === 'failed') message.fault = error.name === 'AbortError' ? 'You stopped this answer before its first word.' : faultOf(error);
    if (error instanceof api.Failure) heard(error);
  }
  running = null;
  save();
  redraw();
  toEnd();
  say(message.fault ?? spoken(message, bodiesOf(messages)));
}

function faultOf(error) {
  if (!(error instanceof api.Failure)) return `The page failed: ${error.message}`;
  const wait = error.seconds ? ` It may be free in about ${error.seconds} s.` : '';
  const anew = error.code === 'context_length_exceeded' ? ' Begin a new conversation, or ask for less.' : '';
  return (/[.!?]$/.test(error.message) ? error.message : `${error.message}.`) + wait + anew;
}

// --- the conversation

const items = new Map();
const cards = new Map();

function redraw() {
  const bodies = bodiesOf(messages);
  the('welcome').hidden = messages.length > 0;
  for (const message of messages) redrawOne(message, bodies);
  the('messages').replaceChildren(...messages.map((message) => items.get(message)));
  the('panel').hidden = bodies.length === 0;
  document.querySelector('main').classList.toggle('bodies', bodies.length > 0);
  the('between').hidden = bodies.length < 2 || !stage;
  refreshComposer();
}

function redrawOne(message, bodies = bodiesOf(messages)) {
  const follow = atEnd();
  if (!items.has(message)) items.set(message, make('li'));
  draw(message, bodies, items.get(message), { retry, pick, card });
  if (follow) toEnd();
}

function card(body) {
  if (!cards.has(body.id)) {
    const picture = stage ? make('canvas', { width: 240, height: 272, 'aria-hidden': 'true' }) : make('img', { alt: '', hidden: true });
    const button = make('button', { type: 'button', className: 'card', 'aria-pressed': 'false' }, picture, make('span', {}, body.label));
    cards.set(body.id, button);
    if (!stage) flat.show(body, picture);
  }
  const button = cards.get(body.id);
  button.onclick = () => pick(body);
  button.body = body;
  visible.unobserve(button);
  visible.observe(button);
  return button;
}

/** Draws cards when they are scrolled to: a long conversation has many bodies. */
const visible = new IntersectionObserver((entries) => {
  for (const { isIntersecting, target } of entries) if (isIntersecting) drawCard(target);
});

async function drawCard(button) {
  if (!stage) return;
  const { rig, reason } = await rigOf(button.body);
  const drawn = reason ?? 'whole';
  if (button.dataset.drawn === drawn) return;
  button.dataset.drawn = drawn;
  const canvas = button.querySelector('canvas');
  canvas.getContext('2d').clearRect(0, 0, canvas.width, canvas.height);
  stage.picture(rig, canvas);
}

const scroll = the('scroll');
const atEnd = () => scroll.scrollHeight - scroll.scrollTop - scroll.clientHeight < 80;
const toEnd = () => (scroll.scrollTop = scroll.scrollHeight);
const save = () => store.save({ messages });

// --- bodies

const loaded = new Map();

/** {rig, reason}: a body, and why it has no surface if it has none. */
function rigOf(body) {
  if (!loaded.has(body.id)) loaded.set(body.id, load(body));
  return loaded.get(body.id);
}

async function load(body) {
  const bare = (reason) => ({ rig: fromJson(body.json), reason });
  const kept = await store.body(body.id);
  if (kept) return { rig: await fromGlb(kept), reason: null };
  if (!body.file) return bare('The server has no file of this sample: its joints are shown.');
  try {
    const data = await (await api.poseFile(body.id, 'glb')).arrayBuffer();
    store.saveBody(body.id, data);
    return { rig: await fromGlb(data), reason: null };
  } catch (error) {
    if (error.code === 'licensed_body') return bare(`Only the joints are shown: ${error.message}.`);
    if (error.code === 'pose_not_found') return bare('Only the joints are shown: the server keeps the surface of a body for a while, and this one is gone.');
    missing.ids.add(body.id);
    return bare(`Only the joints are shown: the surface could not be had. ${error.message}`);
  }
}

let latest = 0;

/** Shows bodies side by side. chosen: the one whose files can be saved. */
async function display(bodies, chosen = bodies.at(-1)) {
  const turn = (latest += 1);
  const ready = await Promise.all(bodies.map(rigOf));
  if (turn !== latest || !bodies.length) return;
  openSlider(false);
  shown = bodies;
  the('nothing').hidden = stage !== null;
  stage?.show(bodies.map(({ id, label, json }, k) => ({ id, label, rig: ready[k].rig, frame: json.frame })));
  choose(chosen);
}

/** A body that was clicked: its answer is shown, and its files can be saved. */
function pick(body) {
  const own = bodiesOf(messages).filter((each) => each.message === body.message);
  return display(own, own.find((each) => each.id === body.id));
}

async function choose(body) {
  active = body;
  stage?.activate(body.id);
  if (!stage) flat.show(body, the('flat'));
  const tab = (each) => make('button', { type: 'button', className: 'quiet', 'aria-pressed': String(each.id === body.id), onclick: () => choose(each) }, each.label);
  const focused = the('tabs').contains(document.activeElement);
  the('tabs').replaceChildren(...(shown.length > 1 ? shown.map(tab) : []));
  if (focused) the('tabs').querySelector('[aria-pressed="true"]')?.focus();
  the('files-of').textContent = `Save ${body.label.toLowerCase()}`;
  for (const [id, button] of cards) button.setAttribute('aria-pressed', String(shown.some((each) => each.id === id)));
  const question = messages[messages.indexOf(body.message) - 1];
  the('canvas').setAttribute('aria-label', `${shown.map((each) => each.label).join(', ')}. Asked: ${question?.text ?? ''}`);
  const [picture] = question?.pictures ?? [];
  the('asked').hidden = !picture;
  if (picture) the('asked').src = picture;
  the('frame').textContent = `${FRAMES[body.json.frame].words}. A square of the floor is half a metre.`;
  const { reason } = await rigOf(body);
  if (active !== body) return;
  the('reason').hidden = !reason;
  the('reason').textContent = reason ?? '';
  const bare = reason !== null;
  for (const button of document.querySelectorAll('[data-save]')) button.disabled = !body.file || (bare && ['glb', 'obj'].includes(button.dataset.save));
}

// --- between two poses

function openSlider(open) {
  if (the('slider').hidden === !open) return;
  the('slider').hidden = !open;
  the('between').setAttribute('aria-expanded', String(open));
  the('tabs').hidden = open;
  if (!open) return;
  const bodies = bodiesOf(messages);
  for (const select of [the('from'), the('to')]) select.replaceChildren(...bodies.map(({ id, label }) => make('option', { value: id }, label)));
  const at = Math.max(bodies.findIndex((body) => body.id === active?.id), 1);
  the('from').value = bodies[at - 1].id;
  the('to').value = bodies[at].id;
  the('amount').value = 0;
  slide();
}

async function slide() {
  const bodies = bodiesOf(messages);
  const [from, to] = ['from', 'to'].map((end) => bodies.find((body) => body.id === the(end).value));
  const turn = (latest += 1);
  const [a, b] = await Promise.all([rigOf(from), rigOf(to)]);
  if (turn !== latest || the('slider').hidden) return;
  const amount = the('amount').value / 100;
  the('amount').setAttribute('aria-valuetext', `${the('amount').value} percent from ${from.label} to ${to.label}`);
  const problem = a.rig.parents.length === b.rig.parents.length ? null : 'These two bodies have different joints, so there is nothing between them.';
  the('reason').hidden = !problem;
  the('reason').textContent = problem ?? '';
  if (problem) return;
  the('canvas').setAttribute('aria-label', `Between ${from.label} and ${to.label}`);
  stage?.between({ id: from.id, rig: a.rig, frame: from.json.frame }, { id: to.id, rig: b.rig }, amount);
}

the('between').addEventListener('click', () => {
  if (the('slider').hidden) openSlider(true);
  else display(shown, active);
});
for (const name of ['from', 'to', 'amount']) the(name).addEventListener('input', slide);

// --- files

async function saveFile(kind) {
  const body = active;
  try {
    hand(await fileOf(body, kind), `${body.label.toLowerCase().replaceAll(/[ ,]+/g, '-')}.${kind}`);
    say(`${body.label} saved as ${kind.toUpperCase()}.`);
  } catch (error) {
    if (error.status === 401 || error.gone) heard(error);
    const gone = error.code === 'pose_not_found' ? 'The server keeps the files of a pose for a while, and these are gone. Its JSON is still here.' : error.message;
    the('reason').textContent = gone;
    the('reason').hidden = false;
    say(gone);
  }
}

async function fileOf(body, kind) {
  const kept = kind === 'glb' && (await store.body(body.id));
  if (kept) return new Blob([kept], { type: 'model/gltf-binary' });
  try {
    return await api.poseFile(body.id, kind);
  } catch (error) {
    if (kind !== 'png' || !stage || error.status === 401) throw error;
    const canvas = make('canvas', { width: 768, height: 768 });
    stage.picture((await rigOf(body)).rig, canvas, 0xf2f2f4);
    return new Promise((resolve) => canvas.toBlob(resolve, 'image/png'));
  }
}

function hand(blob, name) {
  const address = URL.createObjectURL(blob);
  make('a', { href: address, download: name }).click();
  setTimeout(() => URL.revokeObjectURL(address), 60_000);
}

for (const button of document.querySelectorAll('[data-save]')) button.addEventListener('click', () => saveFile(button.dataset.save));

the('copy').addEventListener('click', async () => {
  const text = JSON.stringify(active.json);
  try {
    await navigator.clipboard.writeText(text);
  } catch {
    // Without https there is no clipboard for pages, only the old command.
    const area = make('textarea', { value: text, className: 'hidden' });
    document.body.append(area);
    area.select();
    const done = document.execCommand('copy');
    area.remove();
    if (!done) return say('This browser does not let the page copy.');
  }
  the('copy').textContent = 'Copied';
  setTimeout(() => (the('copy').textContent = 'Copy as JSON'), 1500);
  return say(`${active.label} copied as JSON.`);
});

// --- pictures

function setPictures(list) {
  pictures = list;
  the('pictures').hidden = !list.length;
  the('pictures').replaceChildren(
    ...list.map((src, k) => {
      const remove = () => {
        setPictures(pictures.filter((_, other) => other !== k));
        the('question').focus();
      };
      return make('li', {}, make('img', { src, alt: `Picture ${k + 1}` }), make('button', { type: 'button', 'aria-label': `Remove picture ${k + 1}`, onclick: remove }, '×'));
    }),
  );
  refreshComposer();
}

/** Says below the question what is wrong with this browser or with a file. */
function warn(text) {
  the('hint').textContent = text;
  the('hint').classList.add('wrong');
  say(text);
}

async function take(files) {
  for (const file of files) {
    try {
      setPictures([...pictures, await read(file)]);
      say('Picture added.');
    } catch (error) {
      warn(error.message);
    }
  }
  if (files.length) the('question').focus();
}

the('attach').addEventListener('click', () => the('file').click());
the('file').addEventListener('change', () => {
  take([...the('file').files]);
  the('file').value = '';
});
document.addEventListener('paste', (event) => {
  const files = imagesIn(event.clipboardData);
  if (files.length) event.preventDefault();
  take(files);
});
let over = 0;
const carriesFiles = (event) => event.dataTransfer?.types.includes('Files');
document.addEventListener('dragenter', (event) => {
  if (!carriesFiles(event)) return;
  over += 1;
  the('drop').hidden = false;
});
document.addEventListener('dragleave', (event) => {
  if (!carriesFiles(event)) return;
  over = Math.max(0, over - 1);
  the('drop').hidden = over === 0;
});
document.addEventListener('dragover', (event) => carriesFiles(event) && event.preventDefault());
document.addEventListener('drop', (event) => {
  if (!carriesFiles(event)) return;
  event.preventDefault();
  over = 0;
  the('drop').hidden = true;
  take(imagesIn(event.dataTransfer));
});

// --- keys, buttons, settings

function grow() {
  const area = the('question');
  area.style.height = 'auto';
  area.style.height = `${area.scrollHeight}px`;
}

the('question').addEventListener('input', () => {
  grow();
  refreshComposer();
});
the('question').addEventListener('keydown', (event) => {
  if (event.key === 'Enter' && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    ask();
  }
});
the('composer').addEventListener('submit', (event) => {
  event.preventDefault();
  ask();
});
const stop = () => running?.abort();
the('stop').addEventListener('click', stop);
document.addEventListener('keydown', (event) => {
  if (event.key === 'Escape' && !document.querySelector('dialog[open]')) stop();
});

the('turn').addEventListener('click', () => stage?.setTurning(!stage.turning));
const showTurning = () => the('turn').setAttribute('aria-pressed', String(stage?.turning ?? false));
stage?.addEventListener('turning', showTurning);
showTurning();
the('axes').addEventListener('click', () => {
  const on = the('axes').getAttribute('aria-pressed') !== 'true';
  the('axes').setAttribute('aria-pressed', String(on));
  the('frame').hidden = !on;
  stage?.setAxes(on);
});
the('front').addEventListener('click', () => stage?.front());

for (const close of document.querySelectorAll('[data-close]')) close.addEventListener('click', () => close.closest('dialog').close());
the('new').addEventListener('click', () => the('new-dialog').showModal());
the('forget').addEventListener('click', async () => {
  the('new-dialog').close();
  stop();
  messages = [];
  for (const each of [items, cards, loaded]) each.clear();
  [shown, active, latest] = [[], null, latest + 1];
  stage?.clear();
  the('nothing').hidden = false;
  the('asked').hidden = true;
  the('flat').hidden = true;
  the('canvas').setAttribute('aria-label', 'empty');
  redraw();
  the('question').focus();
  await store.clear();
});

function fillSettings() {
  the('force').checked = settings.force;
  for (const name of ['temperature', 'tokens', 'samples']) the(name).value = settings[name];
  the('temperature-now').textContent = settings.temperature;
}
the('open-settings').addEventListener('click', () => {
  fillSettings();
  the('settings').showModal();
});
the('settings').addEventListener('input', () => {
  const number = (name) => (the(name).checkValidity() && the(name).value !== '' ? Number(the(name).value) : settings[name]);
  Object.assign(settings, { force: the('force').checked, temperature: number('temperature'), tokens: number('tokens'), samples: number('samples') });
  the('temperature-now').textContent = settings.temperature;
  localStorage.setItem('chatpose-settings', JSON.stringify(settings));
});

the('examples').append(
  ...EXAMPLES.map((text) => {
    const choose = () => {
      the('question').value = text;
      grow();
      refreshComposer();
      the('question').focus();
    };
    return make('li', {}, make('button', { type: 'button', onclick: choose }, text));
  }),
);

redraw();
toEnd();
const [last] = bodiesOf(messages).slice(-1);
if (last) pick(last);
if (!store.kept) warn('This browser keeps nothing here: the conversation ends with this tab.');
document.addEventListener('visibilitychange', () => document.hidden || watch());
await watch();
the('question').focus();
