// The floor on which bodies stand, turn and move. It draws only when something changed.

import * as THREE from 'three';
import { OrbitControls } from 'three/addons/controls/OrbitControls.js';
import { Figure, atRest, axesOf } from './rig.js';

const STILL = matchMedia('(prefers-reduced-motion: reduce)');
const DARK = matchMedia('(prefers-color-scheme: dark)');
const TURNS_A_SECOND = 1 / 14;
const MOVE_MS = 900;
const VIEW = new THREE.Vector3(0, 0.13, 1).normalize();

export class Stage extends EventTarget {
  /** Throws where the browser has no WebGL. */
  constructor(canvas, labels) {
    super();
    this.canvas = canvas;
    this.labels = labels;
    this.renderer = new THREE.WebGLRenderer({ canvas, antialias: true, alpha: true });
    this.renderer.setPixelRatio(Math.min(devicePixelRatio, 2));
    this.renderer.shadowMap.enabled = true;
    this.camera = new THREE.PerspectiveCamera(28, 1, 0.05, 60);
    this.scene = new THREE.Scene();
    this.scene.add(...lights(true));
    this.floor = new THREE.Mesh(new THREE.CircleGeometry(1, 96), new THREE.MeshBasicMaterial({ transparent: true, depthWrite: false }));
    this.floor.rotation.x = -Math.PI / 2;
    this.floor.scale.setScalar(FLOOR);
    this.shade = new THREE.Mesh(new THREE.PlaneGeometry(2 * FLOOR, 2 * FLOOR), new THREE.ShadowMaterial({ opacity: 0.22 }));
    this.shade.rotation.x = -Math.PI / 2;
    this.shade.position.y = 0.002;
    this.shade.receiveShadow = true;
    this.scene.add(this.floor, this.shade);
    this.controls = new OrbitControls(this.camera, canvas);
    this.controls.enableDamping = !STILL.matches;
    this.controls.minDistance = 0.6;
    this.controls.maxDistance = 25;
    this.controls.maxPolarAngle = Math.PI * 0.52;
    this.controls.addEventListener('change', () => this.draw());
    this.controls.addEventListener('start', () => this.#touched());
    canvas.addEventListener('keydown', (event) => this.#press(event));
    canvas.addEventListener('webglcontextrestored', () => this.draw());
    DARK.addEventListener('change', () => this.#paint());
    new ResizeObserver(() => this.#resize()).observe(canvas.parentElement);
    this.shown = [];
    this.moving = null;
    this.turning = !STILL.matches;
    this.framed = true;
    this.axes = false;
    this.#paint();
    this.#resize();
  }

  /**
   * Shows bodies side by side. A body that is alone moves from the one before it, others from rest; with animate false they just stand there.
   * @param {{id: string, label: string, rig: import('./rig.js').Rig, frame: string}[]} poses
   */
  show(poses, animate = true) {
    const before = this.shown.length === 1 && poses.length === 1 ? this.shown[0] : null;
    if (before && before.id === poses[0].id && before.rig === poses[0].rig && !this.mixed) return;
    const from = before?.now;
    this.clear();
    this.mixed = false;
    this.shown = poses.map((pose) => ({ ...pose, figure: new Figure(pose.rig, skeletonColor()), now: pose.rig }));
    for (const { figure, frame } of this.shown) {
      figure.axes = axesOf(frame);
      figure.axes.visible = this.axes;
      figure.body.add(figure.axes);
      this.scene.add(figure);
    }
    this.#arrange();
    this.#label();
    if (animate && !STILL.matches) {
      const starts = this.shown.map(({ figure, rig }) => (from && figure.fits(from) ? from : atRest(rig)));
      this.moving = { starts, begun: performance.now() };
      this.#move(this.moving.begun);
    }
    this.draw();
  }

  /** Shows one body between two: exactly ``a`` at 0, exactly ``b`` at 1. */
  between(a, b, amount) {
    const [one] = this.shown;
    const id = `${a.id} ${b.id}`;
    if (!(this.shown.length === 1 && this.mixed && one.id === id)) {
      const bare = a.rig.skin && b.rig.skin ? (rig) => rig : (rig) => ({ ...rig, skin: null });
      this.show([{ ...a, id, label: '', rig: bare(a.rig) }], false);
      this.mixed = true;
      this.shown[0].ends = [bare(a.rig), bare(b.rig)];
      this.#arrange();
    }
    this.moving = null;
    const { figure, ends } = this.shown[0];
    figure.mix(...ends, amount);
    this.draw();
  }

  clear() {
    for (const { figure } of this.shown) figure.dispose();
    this.shown = [];
    this.moving = null;
    this.labels.replaceChildren();
    this.draw();
  }

  activate(id) {
    this.active = id;
    this.#label();
    this.draw();
  }

  setTurning(on) {
    if (this.turning === on) return;
    this.turning = on;
    this.dispatchEvent(new Event('turning'));
    this.draw();
  }

  setAxes(on) {
    this.axes = on;
    for (const { figure } of this.shown) figure.axes.visible = on;
    this.draw();
  }

  /** Back to the view from the front, which is the camera's in the camera frame. */
  front() {
    this.setTurning(false);
    for (const { figure } of this.shown) figure.rotation.y = 0;
    this.framed = true;
    this.#fit();
    this.draw();
  }

  /** Draws a body from the front onto a canvas (2D), in its size. */
  picture(rig, canvas, background = null) {
    const scene = new THREE.Scene();
    const figure = new Figure(rig, skeletonColor());
    scene.add(...lights(false), figure);
    scene.background = background && new THREE.Color(background);
    const camera = new THREE.PerspectiveCamera(24, canvas.width / canvas.height, 0.05, 60);
    place(camera, new THREE.Vector3(0, figure.height / 2, 0), figure.height * 1.12, figure.reach * 2.1);
    const ratio = this.renderer.getPixelRatio();
    this.renderer.setPixelRatio(1);
    this.renderer.setSize(canvas.width, canvas.height, false);
    this.renderer.render(scene, camera);
    canvas.getContext('2d').drawImage(this.canvas, 0, 0);
    figure.dispose();
    this.renderer.setPixelRatio(ratio);
    this.#resize();
  }

  /** Asks for a drawing in the next frame, and for further ones while something moves. */
  draw() {
    this.asked ??= requestAnimationFrame((now) => {
      this.asked = null;
      this.#step(now);
    });
  }

  #step(now) {
    const seconds = Math.min((now - (this.last ?? now)) / 1000, 0.1);
    const turns = this.turning && this.shown.length > 0;
    this.last = turns || this.moving ? now : null;
    if (turns) for (const { figure } of this.shown) figure.rotation.y += 2 * Math.PI * TURNS_A_SECOND * seconds;
    if (this.moving) this.#move(now);
    this.controls.update();
    this.#render();
    if ((turns || this.moving) && !document.hidden) this.draw();
    else if (document.hidden) document.addEventListener('visibilitychange', () => this.draw(), { once: true });
  }

  #move(now) {
    const t = Math.min(Math.max((now - this.moving.begun) / MOVE_MS, 0), 1);
    const eased = t * t * (3 - 2 * t);
    this.shown.forEach(({ figure, rig }, k) => figure.mix(this.moving.starts[k], rig, eased));
    if (t === 1) this.moving = null;
  }

  #render() {
    this.renderer.render(this.scene, this.camera);
    const { clientWidth: width, clientHeight: height } = this.canvas;
    this.shown.forEach(({ figure }, k) => {
      const sign = this.labels.children[k];
      if (!sign) return;
      const point = figure.position.clone().setY(-0.06).project(this.camera);
      const [x, y] = [(point.x + 1) * 0.5 * width, (1 - point.y) * 0.5 * height];
      sign.style.transform = `translate(${x.toFixed(1)}px, ${y.toFixed(1)}px) translate(-50%, 0)`;
    });
  }

  #label() {
    const signs = this.shown.length < 2 ? [] : this.shown;
    this.labels.replaceChildren(
      ...signs.map(({ id, label }) => {
        const sign = document.createElement('span');
        sign.textContent = label;
        sign.classList.toggle('active', id === this.active);
        return sign;
      }),
    );
  }

  /** Bodies in a row, and the view around them; a body between two has the room of both. */
  #arrange() {
    const sizes = this.shown.map(({ figure, rig, ends = [rig] }) => {
      const [heights, reaches] = [[], []];
      for (const end of ends) {
        figure.mix(end, end, 0);
        heights.push(figure.height);
        reaches.push(figure.reach);
      }
      return { height: Math.max(...heights), reach: Math.max(...reaches) };
    });
    const reaches = sizes.map(({ reach }) => reach);
    let x = 0;
    this.shown.forEach(({ figure }, k) => {
      if (k) x += reaches[k - 1] + reaches[k] + 0.12;
      figure.position.x = x;
    });
    for (const { figure } of this.shown) figure.position.x -= x / 2;
    this.width = x + (reaches[0] ?? 0.5) + (reaches.at(-1) ?? 0.5);
    this.height = Math.max(1, ...sizes.map(({ height }) => height));
    const light = this.scene.children.find((each) => each.isDirectionalLight && each.castShadow);
    const half = Math.max(1.6, this.width / 2 + 0.6);
    Object.assign(light.shadow.camera, { left: -half, right: half, top: 2.4, bottom: -1.2 }).updateProjectionMatrix();
    if (this.framed) this.#fit();
  }

  #fit() {
    const middle = new THREE.Vector3(0, this.height * 0.47, 0);
    place(this.camera, middle, this.height * 1.3, this.width * 1.2);
    this.controls.target.copy(middle);
    this.controls.update();
  }

  #touched() {
    this.framed = false;
    this.setTurning(false);
  }

  #press(event) {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    const arm = this.camera.position.clone().sub(this.controls.target);
    const place = new THREE.Spherical().setFromVector3(arm);
    const step = Math.PI / 16;
    const acts = {
      ArrowLeft: () => (place.theta -= step),
      ArrowRight: () => (place.theta += step),
      ArrowUp: () => (place.phi -= step / 2),
      ArrowDown: () => (place.phi += step / 2),
      '+': () => (place.radius /= 1.15),
      '=': () => (place.radius /= 1.15),
      '-': () => (place.radius *= 1.15),
    };
    if (event.key === '0') this.front();
    else if (event.key === ' ') this.setTurning(!this.turning);
    else if (acts[event.key]) {
      this.#touched();
      acts[event.key]();
      place.phi = Math.min(Math.max(place.phi, 0.05), this.controls.maxPolarAngle);
      this.camera.position.setFromSpherical(place).add(this.controls.target);
      this.draw();
    } else return;
    event.preventDefault();
  }

  #resize() {
    const { clientWidth: width, clientHeight: height } = this.canvas.parentElement;
    if (!width || !height) return;
    this.camera.aspect = width / height;
    this.camera.updateProjectionMatrix();
    this.renderer.setSize(width, height, false);
    this.width ??= 1;
    this.height ??= 1.7;
    if (this.framed) this.#fit();
    this.#render();
  }

  #paint() {
    const style = getComputedStyle(document.documentElement);
    this.floor.material.map?.dispose();
    this.floor.material.map = floorTexture(style.getPropertyValue('--floor').trim());
    this.floor.material.needsUpdate = true;
    this.shade.material.opacity = DARK.matches ? 0.5 : 0.2;
    this.draw();
  }
}

/** Metres from the middle of the floor to its end. */
const FLOOR = 4;

/** A floor of squares of half a metre that fades out. */
function floorTexture(color) {
  const size = 2048;
  const canvas = document.createElement('canvas');
  canvas.width = canvas.height = size;
  const pen = canvas.getContext('2d');
  pen.strokeStyle = color;
  pen.lineWidth = 1.8;
  pen.beginPath();
  const squares = FLOOR * 4;
  for (let k = 0; k <= squares; k += 1) {
    const place = (k / squares) * size;
    pen.moveTo(place, 0);
    pen.lineTo(place, size);
    pen.moveTo(0, place);
    pen.lineTo(size, place);
  }
  pen.stroke();
  const fade = pen.createRadialGradient(size / 2, size / 2, size * 0.08, size / 2, size / 2, size / 2);
  fade.addColorStop(0, 'rgb(0 0 0 / 85%)');
  fade.addColorStop(1, 'rgb(0 0 0 / 0%)');
  pen.globalCompositeOperation = 'destination-in';
  pen.fillStyle = fade;
  pen.fillRect(0, 0, size, size);
  const texture = new THREE.CanvasTexture(canvas);
  texture.colorSpace = THREE.SRGBColorSpace;
  texture.anisotropy = 8;
  return texture;
}

function lights(shadows) {
  const sky = new THREE.HemisphereLight(0xffffff, 0xb3a796, 2.8);
  const main = new THREE.DirectionalLight(0xfff4e6, 1.9);
  main.position.set(1.6, 4, 2.8);
  main.castShadow = shadows;
  main.shadow.mapSize.set(2048, 2048);
  main.shadow.radius = 5;
  main.shadow.normalBias = 0.015;
  Object.assign(main.shadow.camera, { near: 0.5, far: 12 });
  const rim = new THREE.DirectionalLight(0xdde8ff, 1.0);
  rim.position.set(-2.5, 2, -2.5);
  return [sky, main, rim];
}

/** Puts a camera in front of what is ``height`` high and ``width`` wide around ``middle``. */
function place(camera, middle, height, width) {
  const half = Math.tan((camera.fov * Math.PI) / 360);
  const distance = Math.max(height / 2 / half, width / 2 / (half * camera.aspect)) + 0.3;
  camera.position.copy(VIEW).multiplyScalar(distance).add(middle);
  camera.lookAt(middle);
  camera.updateMatrixWorld();
}

const skeletonColor = () => (DARK.matches ? 0x62ccbd : 0x0b6f66);
