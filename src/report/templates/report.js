(function () {
  "use strict";
  var PAGE = 10, LONGEST_DIFF = 400;
  var root = document.documentElement;

  function element(name, attributes, text) {
    var made = document.createElement(name);
    Object.keys(attributes || {}).forEach(function (key) { made.setAttribute(key, attributes[key]); });
    if (text !== undefined) made.textContent = text;
    return made;
  }

  // theme
  var button = document.getElementById("theme");
  var system = window.matchMedia("(prefers-color-scheme: dark)");
  function dark() { return root.dataset.theme ? root.dataset.theme === "dark" : system.matches; }
  function name() {
    button.textContent = dark() ? "Light" : "Dark";
    button.setAttribute("aria-label", "Switch to the " + (dark() ? "light" : "dark") + " theme");
  }
  button.hidden = false;
  button.addEventListener("click", function () {
    root.dataset.theme = dark() ? "light" : "dark";
    try { localStorage.setItem("unlora-theme", root.dataset.theme); } catch (error) { /* not kept */ }
    name();
  });
  system.addEventListener("change", name);
  name();

  // words and what is between them; a text without spaces is one word
  function words(text) { return text.match(/\s+|[^\s]+/g) || []; }
  function bare(word) { return word.toLowerCase().replace(/^[^\p{L}\p{N}]+|[^\p{L}\p{N}]+$/gu, "") || word; }
  function spoken(list) { return list.filter(function (word) { return /\S/.test(word); }); }

  // the longest common subsequence of two lists of words: which of each are in both
  function common(a, b) {
    var n = a.length, m = b.length, width = m + 1, table = new Uint16Array((n + 1) * width);
    for (var i = n - 1; i >= 0; i--) {
      for (var j = m - 1; j >= 0; j--) {
        table[i * width + j] = a[i] === b[j] ? table[(i + 1) * width + j + 1] + 1
          : Math.max(table[(i + 1) * width + j], table[i * width + j + 1]);
      }
    }
    var steps = [];
    for (i = 0, j = 0; i < n || j < m;) {
      if (i < n && j < m && a[i] === b[j]) { steps.push(["=", i++, j++]); }
      else if (i < n && (j === m || table[(i + 1) * width + j] > table[i * width + j + 1])) steps.push(["-", i++, j]);
      else steps.push(["+", i, j++]);
    }
    return steps;
  }

  // an answer with the words marked that the compared text has, too; returns how many of them
  function difference(box, text, against) {
    var there = words(text), other = spoken(words(against)), mine = spoken(there);
    if (!against || mine.length > LONGEST_DIFF || other.length > LONGEST_DIFF) {
      box.textContent = text;
      return null;
    }
    var found = 0;
    common(other.map(bare), mine.map(bare)).forEach(function (step, place) {
      if (place) box.append(" ");
      if (step[0] === "-") box.append(element("del", {}, other[step[1]]));
      else if (step[0] === "=") { found++; box.append(element("mark", {}, mine[step[2]])); }
      else box.append(mine[step[2]]);
    });
    return [found, other.length];
  }

  function browser(section) {
    var data = JSON.parse(section.querySelector("script[type='application/json']").textContent);
    var form = section.querySelector("form"), list = section.querySelector(".rows");
    var hits = section.querySelector(".hits"), pager = section.querySelector(".pager");
    var page = 0, timer = 0;
    var seeds = data.models.map(function (model) { return model.seed; })
      .filter(function (seed, i, all) { return seed !== null && all.indexOf(seed) === i; });

    function text(place) { var one = data.texts[place]; return Array.isArray(one) ? one[0] : one; }
    function whole(place) { var one = data.texts[place]; return Array.isArray(one) ? one[1] : null; }
    function options(select, names) {
      names.forEach(function (one, i) { select.append(element("option", { value: String(i) }, one)); });
    }
    // one model of each name: of the chosen seed, or the only one there is
    function models() {
      var seed = seeds.length ? seeds[Number(form.seed.value) || 0] : null, chosen = new Map();
      data.models.forEach(function (model, i) {
        if (!chosen.has(model.name) || model.seed === seed) chosen.set(model.name, i);
      });
      return Array.from(chosen.values());
    }
    function withRole(role) {
      var found = models().filter(function (i) { return data.models[i].role === role; });
      return found.length ? found[0] : null;
    }
    function score(row, model) { var one = model === null ? null : row[2 + model]; return one ? one[1] : null; }
    var names = data.models.filter(function (model) { return model.role === "method"; })
      .map(function (model) { return model.name; })
      .filter(function (one, i, all) { return all.indexOf(one) === i; });
    // how much a row was forgotten: the target's ROUGE less the method's
    function forgotten(row, model, target) {
      var now = score(row, model), before = target === null ? 1 : score(row, target);
      return now === null || before === null ? null : before - now;
    }

    options(form.split, data.splits.map(function (split) { return split.label + " (" + split.rows.length + ")"; }));
    options(form.by, names.length > 1 ? ["the mean of all methods"].concat(names) : names);
    if (!names.length) { form.by.parentElement.hidden = true; form.sort.value = "data"; form.sort.parentElement.hidden = true; }
    if (seeds.length > 1) { options(form.seed, seeds.map(String)); section.querySelector("[data-seeds]").hidden = false; }
    if (!data.models.some(function (model) { return model.role === "target"; })) form.against.querySelector("[value=target]").remove();

    function sortKey(row) {
      var chosen = form.by.selectedIndex - (names.length > 1 ? 1 : 0), target = withRole("target");
      var picked = models().filter(function (i) {
        return data.models[i].role === "method" && (chosen < 0 || data.models[i].name === names[chosen]);
      });
      var values = picked.map(function (i) { return forgotten(row, i, target); })
        .filter(function (value) { return value !== null; });
      return values.length ? values.reduce(function (a, b) { return a + b; }, 0) / values.length : null;
    }
    function found() {
      var sought = form.search.value.toLowerCase().split(/\s+/).filter(Boolean);
      var rows = data.splits[Number(form.split.value) || 0].rows.map(function (row, i) { return [row, i, null]; });
      var shown = models();
      if (sought.length) {
        rows = rows.filter(function (one) {
          var places = [one[0][0], one[0][1]].concat(shown.map(function (i) { return one[0][2 + i] ? one[0][2 + i][0] : -1; }));
          var all = places.filter(function (p) { return p >= 0; }).map(text).join("\n").toLowerCase();
          return sought.every(function (word) { return all.indexOf(word) >= 0; });
        });
      }
      if (form.sort.value !== "data") {
        var sign = form.sort.value === "most" ? -1 : 1;
        rows.forEach(function (one) { one[2] = sortKey(one[0]); });
        rows.sort(function (a, b) {
          if (a[2] === null || b[2] === null) return (a[2] === null) - (b[2] === null) || a[1] - b[1];
          return sign * (a[2] - b[2]) || a[1] - b[1];
        });
      }
      return rows;
    }

    function answer(kind, label, place, against, rouge) {
      var line = element("div", { "class": "answer " + kind });
      var head = element("dt"), body = element("dd", { dir: "auto" });
      head.append(element("bdi", {}, label));
      if (place === null) body.append(element("i", {}, "not asked"));
      else if (!text(place)) body.append(element("i", {}, "(nothing)"));
      else {
        var same = against === null ? null : difference(body, text(place), against);
        if (against === null) body.textContent = text(place);
        if (same) head.append(element("small", {}, same[0] + " of " + same[1] + " words"));
        if (whole(place)) body.append(element("small", { "class": "cut" }, " … cut here; the log has all " + whole(place).toLocaleString("en") + " characters"));
      }
      if (rouge !== null && rouge !== undefined) head.append(element("small", {}, "ROUGE " + rouge.toFixed(2)));
      line.append(head, body);
      return line;
    }

    function item(row, number) {
      var box = element("li", { value: String(number + 1) });
      var target = withRole("target"), mode = form.against.value;
      box.append(element("p", { "class": "question", dir: "auto" }, text(row[0]) || "(nothing)"));
      if (whole(row[0])) box.lastChild.append(element("small", { "class": "cut" }, " … cut here; the log has all " + whole(row[0]).toLocaleString("en") + " characters"));
      var answers = element("dl");
      answers.append(answer("truth", "true answer", row[1], null, null));
      models().forEach(function (i) {
        var model = data.models[i], one = row[2 + i];
        var against = mode === "truth" ? text(row[1])
          : mode === "target" && target !== null && target !== i && row[2 + target] ? text(row[2 + target][0]) : null;
        answers.append(answer(model.role, model.name, one ? one[0] : null, against, one ? one[1] : null));
      });
      box.append(answers);
      return box;
    }

    function show(keep) {
      var rows = found(), last = Math.max(0, Math.ceil(rows.length / PAGE) - 1);
      page = keep ? Math.min(Math.max(page, 0), last) : 0;
      var part = rows.slice(page * PAGE, (page + 1) * PAGE);
      list.replaceChildren.apply(list, part.map(function (one) { return item(one[0], one[1]); }));
      hits.textContent = rows.length === 1 ? "1 row found" : rows.length + " rows found" +
        (rows.length > PAGE ? ", " + (page * PAGE + 1) + " to " + (page * PAGE + part.length) + " shown" : "");
      pager.hidden = rows.length <= PAGE;
      pager.querySelector("span").textContent = (page + 1) + " / " + (last + 1);
      pager.querySelector("[data-go='-1']").disabled = page === 0;
      pager.querySelector("[data-go='1']").disabled = page === last;
    }
    form.addEventListener("submit", function (event) { event.preventDefault(); });
    form.addEventListener("change", function (event) { if (event.target !== form.search) show(false); });
    form.search.addEventListener("input", function () {
      clearTimeout(timer);
      timer = setTimeout(function () { show(false); }, 120);
    });
    pager.addEventListener("click", function (event) {
      var step = Number(event.target.dataset.go || 0);
      if (!step) return;
      page += step;
      show(true);
      section.querySelector("h2").scrollIntoView({ block: "start" });
    });
    show(false);
  }

  document.querySelectorAll(".answers").forEach(browser);
})();
