'use strict';
// Sorting of tables by their columns, enlarging of images, and their sizes in whole pixels. The page is complete without this script.

function sortable(table) {
  const body = table.tBodies[0], heads = [...table.tHead.rows[0].cells];
  const value = (row, column) => row.cells[column].textContent.trim();
  const number = (text) => { const match = text.replace(/,/g, '').match(/^[-+\u2212]?\d+(\.\d+)?(e[-+]?\d+)?/i); return match ? Number(match[0].replace('\u2212', '-')) : NaN; };
  const original = [...body.rows];
  heads.forEach((head, column) => {
    const button = document.createElement('button');
    button.type = 'button';
    button.append(...head.childNodes);
    head.append(button);
    button.addEventListener('click', () => {
      const next = { none: 'ascending', ascending: 'descending', descending: 'none' }[head.getAttribute('aria-sort') ?? 'none'];
      for (const other of heads) other.removeAttribute('aria-sort');
      if (next !== 'none') head.setAttribute('aria-sort', next);
      const sign = next === 'descending' ? -1 : 1;
      const rows = next === 'none' ? original : [...original].sort((a, b) => {
        const x = number(value(a, column)), y = number(value(b, column));
        if (Number.isNaN(x) && Number.isNaN(y)) return sign * value(a, column).localeCompare(value(b, column), 'en');
        if (Number.isNaN(x) || Number.isNaN(y)) return Number.isNaN(x) ? 1 : -1;  // rows without a number come last
        return sign * (x - y);
      });
      body.append(...rows);
    });
  });
}

function enlarging(images) {
  const dialog = document.createElement('dialog'), large = document.createElement('img'), text = document.createElement('p');
  const row = document.createElement('div'), view = document.createElement('div');
  let place = 0, scale = 1;
  const show = () => {
    const { naturalWidth, src, alt } = images[place];
    Object.assign(large, { src, alt });
    large.style.width = `${naturalWidth * scale}px`;  // whole pixels
    text.textContent = `${alt}, ${scale} : 1`;
  };
  const largest = () => {  // the largest whole scale at which the image is seen whole, beside the buttons and the text
    const { naturalWidth, naturalHeight } = images[place];
    return Math.min(16, Math.max(1, Math.floor(Math.min((0.96 * innerWidth - 30) / naturalWidth, (0.96 * innerHeight - 150) / naturalHeight))));
  };
  const open = (index) => { place = (index + images.length) % images.length; scale = largest(); show(); if (!dialog.open) dialog.showModal(); };
  const zoom = (by) => { scale = Math.min(16, Math.max(1, scale + by)); show(); };
  const actions = [['Previous', () => open(place - 1)], ['Next', () => open(place + 1)], ['Larger', () => zoom(1)], ['Smaller', () => zoom(-1)], ['Close', () => dialog.close()]];
  for (const [label, action] of actions) {
    const button = document.createElement('button');
    Object.assign(button, { type: 'button', textContent: label });
    button.addEventListener('click', action);
    row.append(button);
  }
  dialog.setAttribute('aria-label', 'Enlarged image');
  row.className = 'tools';
  view.className = 'view';
  view.tabIndex = 0;  // so that the keyboard scrolls a large image
  view.setAttribute('role', 'group');
  view.setAttribute('aria-label', 'Image');
  text.setAttribute('aria-live', 'polite');
  view.append(large);
  dialog.append(row, view, text);
  document.body.append(dialog);
  dialog.addEventListener('keydown', (event) => {
    const keys = { ArrowLeft: actions[0][1], ArrowRight: actions[1][1], '+': actions[2][1], '-': actions[3][1] };
    if (event.target === view && event.key.startsWith('Arrow')) return;
    if (keys[event.key]) { event.preventDefault(); keys[event.key](); }
  });
  dialog.addEventListener('click', (event) => { if (event.target === dialog) dialog.close(); });
  images.forEach((image, index) => {
    image.tabIndex = 0;
    image.setAttribute('role', 'button');
    image.title = 'Enlarge';
    image.addEventListener('click', () => open(index));
    image.addEventListener('keydown', (event) => { if (event.key === 'Enter' || event.key === ' ') { event.preventDefault(); open(index); } });
  });
}

function sizing(images) {  // the largest whole multiple of the image's own size that fits; if none does, the image is reduced
  const fit = () => {
    for (const image of images) {
      const natural = image.naturalWidth || 1, place = Math.min(Number(image.getAttribute('width')), image.parentElement.clientWidth);
      const times = Math.floor(place / natural);
      image.style.width = times ? `${times * natural}px` : '';
      image.classList.toggle('reduced', !times);
    }
  };
  addEventListener('resize', fit);
  addEventListener('load', fit);
}

document.querySelectorAll('table.sortable').forEach(sortable);
const pictures = [...document.querySelectorAll('main img:not(.legend img)')];
if (pictures.length) {
  sizing(pictures);
  enlarging(pictures);
}
