// The interactive figure of β, drawn from the JSON beside it. Texts of data and models reach the page as textContent
// only, never as markup.
(() => {
  const SVG = 'http://www.w3.org/2000/svg';
  const WIDTH = 900, HEIGHT = 300, LEFT = 70, RIGHT = 12, TOP = 12, BOTTOM = 90;
  const STRIP_TOP = HEIGHT - 36, STRIP_HEIGHT = 30; // the decisions of each step, below the axis
  const DECISIONS = ['relaxed', 'tied', 'tightened'];
  const NAME_OF = {1: 'relaxed', '-1': 'tightened'};

  function element(parent, name, attributes = {}, text = null) {
    const isDrawing = parent.namespaceURI === SVG || name === 'svg';
    const made = isDrawing ? document.createElementNS(SVG, name) : document.createElement(name);
    for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
    if (text !== null) made.textContent = text;
    parent.append(made);
    return made;
  }

  const number = value => String(Number(value.toPrecision(4)));

  // Round numbers from `low` to `high`, about `count` of them.
  function ticks(low, high, count) {
    const rough = (high - low) / count, unit = 10 ** Math.floor(Math.log10(rough));
    const size = [1, 2, 5, 10].map(times => times * unit).find(size => size >= rough);
    const found = [];
    for (let value = Math.ceil(low / size) * size; value <= high + size / 1e6; value += size) found.push(value);
    return found;
  }

  function draw(figure) {
    const data = JSON.parse(figure.querySelector('script[type="application/json"]').textContent);
    const {step, before, after} = data.steps, last = step.length - 1;
    const highest = 1.05 * Math.max(...before);
    const span = Math.max(1, step[last] - step[0]);
    const x = index => LEFT + (WIDTH - LEFT - RIGHT) * (step[index] - step[0]) / span;
    const y = beta => HEIGHT - BOTTOM - (HEIGHT - BOTTOM - TOP) * beta / highest;
    let current = 0, pinned = false;

    figure.querySelector('p').remove();
    const svg = element(figure, 'svg', {
      viewBox: `0 0 ${WIDTH} ${HEIGHT}`, tabindex: 0, role: 'slider', 'aria-label': `${data.title}: optimiser step`,
      'aria-valuemin': step[0], 'aria-valuemax': step[last], 'font-family': 'sans-serif', 'font-size': 12,
      style: 'width: 100%; height: auto; background: white; touch-action: pan-y; cursor: crosshair',
    });
    drawAxes();
    drawDecisions();
    const line = before.map((beta, index) => `${x(index).toFixed(1)},${y(beta).toFixed(1)}`).join(' ');
    element(svg, 'polyline', {points: line, fill: 'none', stroke: data.style.colour, 'stroke-width': 2});
    const cursor = element(svg, 'line', {y1: TOP, y2: STRIP_TOP + STRIP_HEIGHT, stroke: '#333333', 'stroke-width': 1});
    const dot = element(svg, 'circle', {r: 4.5, fill: data.style.colour, stroke: 'white'});
    const panel = element(figure, 'div', {
      'aria-live': 'polite', style: 'min-height: 16em; font-size: 90%; overflow-x: auto',
    });
    const hint = 'Point at a step, or use the arrow keys; a click or Enter keeps it, Escape lets go. ';
    element(figure, 'p', {style: 'font-size: 85%; color: #555555'}, hint + data.note);

    function drawAxes() {
      for (const beta of ticks(0, highest, 7)) {
        element(svg, 'line', {x1: LEFT, x2: WIDTH - RIGHT, y1: y(beta), y2: y(beta), stroke: '#dddddd'});
        element(svg, 'text', {x: LEFT - 6, y: y(beta) + 4, 'text-anchor': 'end'}, number(beta));
      }
      for (const tick of ticks(step[0], step[last], 8).filter(Number.isInteger)) {
        const place = LEFT + (WIDTH - LEFT - RIGHT) * (tick - step[0]) / span;
        element(svg, 'text', {x: place, y: HEIGHT - BOTTOM + 16, 'text-anchor': 'middle'}, tick);
      }
      element(svg, 'line', {x1: LEFT, x2: WIDTH - RIGHT, y1: y(0), y2: y(0), stroke: '#333333'});
      const middle = (HEIGHT - BOTTOM + TOP) / 2;
      const turned = {x: 16, y: middle, 'text-anchor': 'middle', transform: `rotate(-90 16 ${middle})`};
      element(svg, 'text', turned, 'β (KL penalty)');
      element(svg, 'text', {x: (LEFT + WIDTH) / 2, y: HEIGHT - BOTTOM + 34, 'text-anchor': 'middle'}, 'optimiser step');
      element(svg, 'text', {x: LEFT - 6, y: STRIP_TOP + 19, 'text-anchor': 'end'}, 'decisions');
    }

    // One column per step, one path per decision.
    function drawDecisions() {
      const width = Math.max(0.4, (WIDTH - LEFT - RIGHT) / (last + 1));
      const totals = step.map((_, index) => DECISIONS.reduce((sum, name) => sum + data.steps[name][index], 0));
      const filled = step.map(() => 0);
      for (const name of DECISIONS) {
        const columns = step.map((_, index) => {
          const share = totals[index] ? data.steps[name][index] / totals[index] : 0;
          const top = STRIP_TOP + STRIP_HEIGHT * filled[index];
          filled[index] += share;
          const start = Math.min(x(index), WIDTH - RIGHT - width).toFixed(1);
          return share ? `M${start} ${top.toFixed(2)}h${width.toFixed(2)}v${(STRIP_HEIGHT * share).toFixed(2)}h-${width.toFixed(2)}z` : '';
        });
        element(svg, 'path', {d: columns.join(''), fill: data.style.decisions[name]});
      }
    }

    function show(index) {
      current = Math.min(last, Math.max(0, index));
      for (const end of ['x1', 'x2']) cursor.setAttribute(end, x(current));
      dot.setAttribute('cx', x(current));
      dot.setAttribute('cy', y(before[current]));
      svg.setAttribute('aria-valuenow', step[current]);
      panel.replaceChildren();
      const head = element(panel, 'p', {style: 'margin: 0.4em 0'});
      element(head, 'b', {}, `Step ${step[current]}${pinned ? ' (kept)' : ''}: β ${number(before[current])} → ${number(after[current])}. `);
      for (const name of DECISIONS) {
        const style = `display: inline-block; width: 0.8em; height: 0.8em; background: ${data.style.decisions[name]}`;
        element(head, 'span', {style});
        element(head, 'span', {}, ` ${data.steps[name][current]} ${data.style.labels[name]}  `);
      }
      showPairs(data.pairs[current], data.steps.relaxed[current] + data.steps.tightened[current]);
    }

    function showPairs(pairs, moved) {
      if (!moved) return void element(panel, 'p', {}, data.none_moved);
      if (pairs.length) {
        const table = element(panel, 'table', {style: 'border-collapse: collapse; width: 100%; text-align: left'});
        const header = element(table, 'tr');
        const names = ['pair', 'decision', 'margin (nats)', 'tokens', 'prompt', 'chosen', 'rejected'];
        for (const name of names) element(header, 'th', {style: 'text-align: left; padding: 2px 6px'}, name);
        for (const [place, decision, margin, chosenTokens, rejectedTokens] of pairs) {
          const [pair, ...texts] = data.texts[place], name = NAME_OF[decision];
          const row = element(table, 'tr', {style: 'vertical-align: top; border-top: 1px solid #dddddd'});
          for (const text of [pair, name, number(margin), `${chosenTokens} / ${rejectedTokens}`]) {
            const cell = element(row, 'td', {style: 'text-align: left; padding: 2px 6px; white-space: nowrap'}, text);
            if (text === name) cell.style.color = data.style.decisions[name];
          }
          const wrapped = 'text-align: left; padding: 2px 6px; white-space: normal; overflow-wrap: anywhere; min-width: 8em';
          for (const text of texts) element(row, 'td', {style: wrapped}, text);
        }
      }
      if (moved > pairs.length) element(panel, 'p', {style: 'margin: 0.3em 0'}, `and ${moved - pairs.length} more`);
    }

    function nearest(event) {
      const box = svg.getBoundingClientRect();
      const place = (event.clientX - box.left) / box.width * WIDTH;
      let best = 0;
      for (let index = 1; index <= last; index++) if (Math.abs(x(index) - place) < Math.abs(x(best) - place)) best = index;
      return best;
    }

    svg.addEventListener('pointermove', event => { if (!pinned) show(nearest(event)); });
    svg.addEventListener('click', event => { pinned = !pinned || nearest(event) !== current; show(nearest(event)); });
    svg.addEventListener('keydown', event => {
      const moves = {ArrowLeft: -1, ArrowRight: 1, PageDown: -10, PageUp: 10, Home: -last, End: last};
      if (event.key in moves) show(current + moves[event.key]);
      else if (event.key === 'Enter') { pinned = !pinned; show(current); }
      else if (event.key === 'Escape') { pinned = false; show(current); }
      else return;
      // JupyterLab has commands on the same keys.
      event.preventDefault();
      event.stopPropagation();
    });
    // The first step that moved β, or else whose pairs would have: at the start policy and reference are one, and all tie.
    const moving = before.findIndex((beta, index) => after[index] !== beta);
    const decided = step.findIndex((_, index) => data.steps.relaxed[index] + data.steps.tightened[index] > 0);
    show(Math.max(0, moving >= 0 ? moving : decided));
  }

  // A page may hold several, and JupyterLab runs a script again when it shows an output once more.
  for (const figure of document.querySelectorAll('figure[data-beta-steps]')) if (!figure.querySelector('svg')) draw(figure);
})();
