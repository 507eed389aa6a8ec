// A pose as a tree of joints, with or without a surface: from the skinned GLB of the server, or from the joints of its JSON. In glTF's axes: y up.

import * as THREE from 'three';
import { GLTFLoader } from 'three/addons/loaders/GLTFLoader.js';

/** What each frame's axes are, and the rotation that takes them to glTF's. */
export const FRAMES = {
  camera: { words: 'camera frame: x right, y down, z away from the camera', turn: new THREE.Quaternion(1, 0, 0, 0) },
  model: { words: 'model frame: y up, a resting body faces z', turn: new THREE.Quaternion(0, 0, 0, 1) },
  'z-up': { words: 'z-up frame: a resting body faces −y', turn: new THREE.Quaternion(-Math.SQRT1_2, 0, 0, Math.SQRT1_2) },
};

/**
 * @typedef {object} Rig
 * @property {number[]} parents of each joint, -1 for the root; a parent precedes its children
 * @property {THREE.Vector3[]} places of the joints relative to their parents, metres
 * @property {THREE.Quaternion[]} turns of the joints relative to their parents
 * @property {?{geometry: THREE.BufferGeometry, inverses: THREE.Matrix4[], material: THREE.Material}} skin
 */

const loader = new GLTFLoader();

/** @returns {Promise<Rig>} of a GLB as smpl_jax writes it: its surface in the pose's rest shape, and its posed joints. */
export async function fromGlb(buffer) {
  const { scene } = await loader.parseAsync(buffer, '');
  let mesh;
  scene.traverse((node) => (mesh = node.isSkinnedMesh ? node : mesh));
  if (!mesh) throw new Error('the file holds no rigged body');
  const { bones, boneInverses } = mesh.skeleton;
  return {
    parents: bones.map((bone) => bones.indexOf(bone.parent)),
    places: bones.map((bone) => bone.position.clone()),
    turns: bones.map((bone) => bone.quaternion.clone()),
    skin: { geometry: mesh.geometry, inverses: boneInverses, material: mesh.material },
  };
}

/** @returns {Rig} of a pose as the server's JSON has it, without a surface. Bones keep the lengths that they have in ``joints``. */
export function fromJson({ axis_angle: angles, joints, parents, frame }) {
  const turn = FRAMES[frame].turn;
  const points = joints.map((joint) => new THREE.Vector3(...joint).applyQuaternion(turn));
  // A body may have other joints than the pose has rotations; the first 22 are the same in all families.
  const known = angles.length === joints.length ? angles.length : 22;
  const turns = joints.map((_, k) => (k < known ? fromAxisAngle(angles[k]) : new THREE.Quaternion()));
  turns[0].premultiply(turn);
  const whole = [];
  const places = parents.map((parent, k) => {
    whole[k] = parent < 0 ? turns[k] : whole[parent].clone().multiply(turns[k]);
    if (parent < 0) return points[k];
    return points[k].clone().sub(points[parent]).applyQuaternion(whole[parent].clone().invert());
  });
  return { parents, places, turns, skin: null };
}

/** @returns {Rig} the same body at rest, as it stands and faces in ``rig``: what a body moves from when there is none before it. */
export function atRest(rig) {
  return { ...rig, turns: rig.turns.map((turn, k) => (k ? new THREE.Quaternion() : turn.clone())) };
}

function fromAxisAngle([x, y, z]) {
  const axis = new THREE.Vector3(x, y, z);
  const angle = axis.length();
  return new THREE.Quaternion().setFromAxisAngle(angle ? axis.divideScalar(angle) : axis.set(1, 0, 0), angle);
}

const BONE = new THREE.CylinderGeometry(0.012, 0.02, 1, 12).translate(0, 0.5, 0);
const JOINT = new THREE.SphereGeometry(0.028, 20, 14);
const UP = new THREE.Vector3(0, 1, 0);

/**
 * A body on the floor, between two rigs of one skeleton: ``mix(a, b, t)`` turns each joint the shortest way (slerp) and moves surface and places
 * along straight lines, so it is exactly ``a`` at 0 and exactly ``b`` at 1. Its origin is on the floor below the root.
 */
export class Figure extends THREE.Group {
  constructor(rig, color) {
    super();
    this.body = new THREE.Group();
    this.add(this.body);
    this.bones = rig.parents.map(() => new THREE.Bone());
    rig.parents.forEach((parent, k) => (parent < 0 ? this.body : this.bones[parent]).add(this.bones[k]));
    this.parents = rig.parents;
    this.material = rig.skin?.material.clone() ?? new THREE.MeshStandardMaterial({ color, roughness: 0.6 });
    this.mesh = null;
    if (rig.skin) this.#addSkin(rig.skin);
    else this.#addSticks();
    this.globals = rig.parents.map(() => new THREE.Matrix4());
    this.mix(rig, rig, 0);
  }

  #addSkin({ geometry, inverses }) {
    const own = new THREE.BufferGeometry();
    for (const [name, attribute] of Object.entries(geometry.attributes)) {
      own.setAttribute(name, name === 'position' || name === 'normal' ? attribute.clone() : attribute);
    }
    own.setIndex(geometry.index);
    this.mesh = new THREE.SkinnedMesh(own, this.material);
    this.mesh.frustumCulled = false;
    this.mesh.castShadow = true;
    this.body.add(this.mesh);
    this.mesh.bind(new THREE.Skeleton(this.bones, inverses.map((each) => each.clone())), new THREE.Matrix4());
  }

  #addSticks() {
    this.sticks = this.bones.map((bone, k) => {
      bone.add(this.#part(JOINT));
      if (this.parents[k] < 0) return null;
      const stick = this.#part(BONE);
      this.bones[this.parents[k]].add(stick);
      return stick;
    });
  }

  #part(geometry) {
    const part = new THREE.Mesh(geometry, this.material);
    part.castShadow = true;
    return part;
  }

  /** Whether this figure can stand between the two. */
  fits(...rigs) {
    const vertices = this.mesh?.geometry.attributes.position.count;
    return rigs.every((rig) => rig.parents.length === this.parents.length && (!this.mesh || rig.skin?.geometry.attributes.position.count === vertices));
  }

  mix(a, b, t) {
    this.bones.forEach((bone, k) => {
      bone.position.lerpVectors(a.places[k], b.places[k], t);
      bone.quaternion.slerpQuaternions(a.turns[k], b.turns[k], t);
      this.sticks?.[k] && lay(this.sticks[k], bone.position);
    });
    if (this.mesh) this.#mixSkin(a.skin, b.skin, t);
    this.#stand();
  }

  #mixSkin(a, b, t) {
    for (const name of ['position', 'normal']) {
      const from = a.geometry.attributes[name].array;
      const to = b.geometry.attributes[name].array;
      const attribute = this.mesh.geometry.attributes[name];
      for (let i = 0; i < from.length; i += 1) attribute.array[i] = from[i] + (to[i] - from[i]) * t;
      attribute.needsUpdate = true;
    }
    this.mesh.skeleton.boneInverses.forEach((matrix, k) => {
      const [from, to] = [a.inverses[k].elements, b.inverses[k].elements];
      for (let i = 0; i < 16; i += 1) matrix.elements[i] = from[i] + (to[i] - from[i]) * t;
    });
  }

  /** Puts the lowest point on the floor and the root above the origin; measures height and reach. */
  #stand() {
    const matrix = new THREE.Matrix4();
    this.bones.forEach((bone, k) => {
      matrix.compose(bone.position, bone.quaternion, bone.scale);
      if (this.parents[k] < 0) this.globals[k].copy(matrix);
      else this.globals[k].multiplyMatrices(this.globals[this.parents[k]], matrix);
    });
    const root = this.bones[0].position;
    let [low, high, reach] = [Infinity, -Infinity, 0];
    for (const [x, y, z] of this.mesh ? this.#points() : this.#joints()) {
      low = Math.min(low, y);
      high = Math.max(high, y);
      reach = Math.max(reach, Math.hypot(x - root.x, z - root.z));
    }
    const thick = this.mesh ? 0 : 0.03;
    this.height = high - low + 2 * thick;
    this.reach = reach + thick;
    this.body.position.set(-root.x, thick - low, -root.z);
  }

  *#joints() {
    for (const { elements: m } of this.globals) yield [m[12], m[13], m[14]];
  }

  *#points() {
    const { position, skinIndex, skinWeight } = this.mesh.geometry.attributes;
    const matrices = this.globals.map((each, k) => new THREE.Matrix4().multiplyMatrices(each, this.mesh.skeleton.boneInverses[k]).elements);
    const point = [0, 0, 0];
    for (let i = 0; i < position.count; i += 1) {
      const [x, y, z] = [position.array[3 * i], position.array[3 * i + 1], position.array[3 * i + 2]];
      point.fill(0);
      for (let n = 0; n < 4; n += 1) {
        const weight = skinWeight.array[4 * i + n];
        if (!weight) continue;
        const m = matrices[skinIndex.array[4 * i + n]];
        for (let r = 0; r < 3; r += 1) point[r] += weight * (m[r] * x + m[4 + r] * y + m[8 + r] * z + m[12 + r]);
      }
      yield point;
    }
  }

  dispose() {
    this.mesh?.geometry.dispose();
    this.mesh?.skeleton.dispose();
    this.material.dispose();
    this.removeFromParent();
  }
}

function lay(stick, offset) {
  const length = offset.length();
  stick.scale.set(1, Math.max(length, 1e-4), 1);
  if (length) stick.quaternion.setFromUnitVectors(UP, offset.clone().divideScalar(length));
}

/** Three arrows along a frame's axes, at its origin. */
export function axesOf(frame) {
  const group = new THREE.Group();
  const ends = { x: [1, 0, 0, 0xd43d3d], y: [0, 1, 0, 0x2f9e44], z: [0, 0, 1, 0x3b74e0] };
  for (const [name, [x, y, z, color]] of Object.entries(ends)) {
    const axis = new THREE.Vector3(x, y, z);
    const arrow = new THREE.ArrowHelper(axis, new THREE.Vector3(), 0.55, color, 0.09, 0.05);
    for (const part of [arrow.line, arrow.cone]) {
      part.material.depthTest = false;
      part.renderOrder = 2;
    }
    const sign = letter(name, `#${color.toString(16)}`);
    sign.position.copy(axis).multiplyScalar(0.64);
    group.add(arrow, sign);
  }
  group.quaternion.copy(FRAMES[frame].turn);
  return group;
}

function letter(text, color) {
  const canvas = document.createElement('canvas');
  canvas.width = canvas.height = 64;
  const pen = canvas.getContext('2d');
  pen.font = '600 52px system-ui, sans-serif';
  pen.textAlign = 'center';
  pen.textBaseline = 'middle';
  pen.fillStyle = color;
  pen.fillText(text, 32, 32);
  const texture = new THREE.CanvasTexture(canvas);
  texture.colorSpace = THREE.SRGBColorSpace;
  const sign = new THREE.Sprite(new THREE.SpriteMaterial({ map: texture, depthTest: false }));
  sign.scale.setScalar(0.13);
  sign.renderOrder = 3;
  return sign;
}
