/* Of the report: its data stands in the page. */
(function () {
  "use strict";
  const root = document.getElementById("align-audit");
  AlignAudit.render(root, JSON.parse(document.getElementById("align-audit-data").textContent));
  AlignAudit.printing(root);
})();
