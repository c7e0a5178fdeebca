"""The style sheet of all pages: light and dark, one column on a phone, no fonts from outside."""

STYLE = """
:root{color-scheme:light dark;
--sans:ui-sans-serif,system-ui,-apple-system,"Segoe UI",Roboto,
"Helvetica Neue",Arial,"DejaVu Sans",sans-serif;
--serif:"Iowan Old Style","Palatino Linotype",Palatino,"Book Antiqua",Georgia,"DejaVu Serif",serif;
--paper:#faf9f6;--card:#fff;--ink:#1d2025;--muted:#676d78;--rule:#e3e1da;--accent:#2f5d8c;--warn:#a33b20;
--s0:#2f5d8c;--s1:#d17a3a;--s2:#5f9778;--s3:#8d6aa8;--s4:#b8962e;--s5:#7d8591;
--g0:#22577a;--g1:#2f7f93;--g2:#4fa08f;--g3:#86b878;--g4:#cdbf5b;--g5:#e6a64b;--g6:#dd7b3d;--g7:#bf4a36;
--warm:#dd7b3d;--cool:#3d7fb5}
@media (prefers-color-scheme:dark){:root{--paper:#14161a;--card:#1b1e24;--ink:#e8e6e1;--muted:#9aa1ad;
--rule:#2e333c;--accent:#8fb8e0;
--warn:#f0916f;
--s0:#7aaede;--s1:#e79a5f;--s2:#86c2a0;--s3:#b797d1;--s4:#d8ba5c;--s5:#9aa3b0;
--g0:#4a8fb8;--g1:#4ca3b5;--g2:#6abbaa;--g3:#9dcc90;--g4:#d9cd74;--g5:#ecb566;--g6:#e8935a;--g7:#dc6f5b;
--warm:#e8935a;--cool:#6ea9db}}
*{box-sizing:border-box}html{-webkit-text-size-adjust:100%}
body{margin:0;background:var(--paper);color:var(--ink);font:16px/1.55 var(--sans)}
header,main{max-width:1180px;margin:0 auto;padding:0 24px}header{padding-top:44px}
.kicker{margin:0;color:var(--muted);font-size:13px;letter-spacing:.08em;text-transform:uppercase}
h1,h2{font-family:var(--serif);font-weight:600;line-height:1.2;letter-spacing:-.01em;overflow-wrap:anywhere}
h1{font-size:36px;
margin:4px 0 12px}h2{font-size:25px;margin:0 0 8px}
h3{font-size:15px;font-weight:600;margin:0 0 6px}h4{font-size:13px;font-weight:600;color:var(--muted);
margin:0 0 4px}
.facts{display:flex;flex-wrap:wrap;gap:4px 20px;margin:0 0 14px;color:var(--muted);font-size:14px}.facts b{
font-weight:600;
color:var(--ink)}
nav{display:flex;flex-wrap:wrap;gap:4px 16px;padding:10px 0;border-top:1px solid var(--rule);
border-bottom:1px solid var(--rule);
font-size:14px}
a{color:var(--accent);text-decoration:none}a:hover{text-decoration:underline}
.warning{color:var(--warn);border:1px solid currentColor;border-radius:6px;padding:8px 12px;font-weight:600}
section{padding:38px 0 6px}.lead{max-width:72ch;margin:0 0 14px;color:var(--muted);overflow-wrap:anywhere}
.lead b,#in-short .lead{color:var(--ink)}
#in-short .lead{font-size:18px}
.cards{display:grid;grid-template-columns:repeat(auto-fill,minmax(228px,1fr));gap:14px}
.card,figure,article{background:var(--card);border:1px solid var(--rule);border-radius:10px;
padding:16px 18px;margin:0;min-width:0}
.card h3{color:var(--muted)}.value{font:600 34px/1.1 var(--serif);font-variant-numeric:tabular-nums;
margin:0}.interval{margin:2px 0 10px;
color:var(--muted);font-size:14px;font-variant-numeric:tabular-nums}
.strip{position:relative;height:18px;border-bottom:1px solid var(--rule);margin:0 5px 10px}.strip i{
position:absolute}
.span{bottom:4px;height:5px;background:var(--accent);opacity:.28;border-radius:3px}.dot{bottom:2px;
width:9px;height:9px;
margin-left:-4.5px;border-radius:50%;background:var(--accent)}
.tick{bottom:-1px;width:2px;height:16px;margin-left:-1px}.t1{background:var(--s1)}.t2{background:var(--s2)}
.t3{background:var(--s3)}
.t0{background:var(--s4)}
.card ul{list-style:none;margin:0 0 6px;padding:0;font-size:13.5px;color:var(--muted);display:flex;
flex-wrap:wrap;gap:0 14px}
.card ul b{color:var(--ink);font-weight:600;font-variant-numeric:tabular-nums}
.key{display:inline-block;width:8px;height:8px;border-radius:2px;margin-right:5px}.meaning{margin:0;
font-size:13px;color:var(--muted);
line-height:1.4}
.figures{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,440px),1fr));gap:16px;
margin:6px 0 16px;align-items:start}
figure svg{display:block;width:100%;height:auto;max-width:620px;font-family:var(--sans)}figure.wide{
grid-column:1/-1}
figcaption{font-size:13.5px;color:var(--muted);line-height:1.45;margin-top:8px}
.scroll{overflow-x:auto;margin:8px 0 16px;-webkit-overflow-scrolling:touch}table{border-collapse:separate;
border-spacing:0;font-size:14px;
width:100%}
caption{text-align:left;font-weight:600;padding:14px 0 6px}th,td{padding:6px 12px 6px 0;text-align:left;
border-bottom:1px solid var(--rule);vertical-align:top}
td{min-width:5em}tbody th{white-space:nowrap;max-width:22em;overflow:hidden;text-overflow:ellipsis}td.text{
min-width:15em}
td.text:last-child{min-width:8.5em}
td:last-child{color:var(--muted)}td.n:last-child{color:inherit}thead th{color:var(--muted);font-weight:600;
font-size:13px;
vertical-align:bottom}tbody th{font-weight:500}
.n{text-align:right;font-variant-numeric:tabular-nums;white-space:nowrap}
details{margin:4px 0 14px}summary{cursor:pointer;color:var(--accent);font-size:14.5px}
.legend{display:flex;flex-wrap:wrap;gap:6px 14px;font-size:13px;color:var(--muted);margin:0 0 12px}.scale{
display:inline-flex;gap:3px;
align-items:center}.scale span{padding:0 6px;border-radius:3px;color:var(--ink)}
.cool{background:color-mix(in srgb,var(--cool) 60%,transparent)}.warm{
background:color-mix(in srgb,var(--warm) 60%,transparent)}
.tokens{margin:0 0 16px;line-height:1.95;font-size:15px;white-space:pre-wrap;overflow-wrap:anywhere}
.seg{border-bottom:2px solid transparent;border-radius:2px;padding:1px 0}
.instruction{border-bottom-color:var(--s5)}.template{border-bottom-color:var(--rule)}.history{
border-bottom-color:var(--s2)}
.target{border-bottom-color:var(--s1)}
.examples{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,440px),1fr));gap:16px}
article p{margin:0 0 10px;
overflow-wrap:anywhere}small{font-weight:400;color:var(--muted)}
.lists{display:grid;grid-template-columns:1fr 1fr;gap:18px;font-size:13.5px;line-height:1.4}.lists>div{
min-width:0}
.lists ol,.lists ul{margin:0;padding-left:1.5em;overflow-wrap:anywhere}.lists li{margin-bottom:3px}
.hit{font-weight:600;color:var(--accent)}.hit::after{content:" \\25CF"}.seen{color:var(--muted)}
.seen::after{content:" \\25CB"}
@media (max-width:560px){tbody th{white-space:normal;min-width:8.6em;max-width:11em;position:sticky;left:0;
background:var(--paper);
overflow-wrap:anywhere}td.text{min-width:20em}header,main{padding-left:16px;padding-right:16px}header{
padding-top:26px}h1{font-size:28px}
h2{font-size:22px}section{padding-top:30px}
.cards{grid-template-columns:1fr 1fr;gap:10px}.card{padding:12px}.value{font-size:26px}figure,article{
padding:14px 12px}
#in-short .lead{font-size:16.5px}.lists{gap:10px;font-size:13px}}
@media print{body{background:#fff}section,figure,.card{break-inside:avoid}nav{display:none}}
"""
