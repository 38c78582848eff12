import base64
import html
import json
import re

from covseg_jax.evaluation import report, scores


def test_report_lists_every_case_worst_first_and_the_undefined_last(page):
    table = page[page.index('<table id="cases">') :]
    found = re.findall(r'<td data-key="(study_\d+)">\s*(\S+?)</td>', table)
    assert [key for key, _ in found] == ['study_0256', 'study_0255', 'study_0257', 'study_0258']
    assert all(key == text for key, text in found)
    assert 'none predicted): study_0258.' in page


def test_report_shows_the_figures_of_the_summary(page):
    # Dice 0.125, 0.5, 0.875: mean and median 0.5, standard deviation 0.375.
    row = re.search(r'<tr><td>Dice</td>(.*?)</tr>', page).group(1)
    cells = re.findall(r'<td class="number">(.*?)</td>', row)
    assert (cells[:3], cells[-2:]) == (['0.500', '0.375', '0.500'], ['3', '1'])
    assert '<td class="number">0.375</td>' in page[page.index('<code>slice_all') :]
    assert 'Pseudo-masks against the true masks' in page


def test_report_needs_nothing_outside_itself(page, tmp_path):
    assert '://' not in page
    sources = re.findall(r'(?:src|href)="([^"]{0,30})', page)
    assert sources
    assert all(source.startswith('data:') for source in sources)
    figure = page[page.index('<h2>Figures') :]
    embedded = re.search(r'data:image/png;base64,([\w+/=]+)', figure).group(1)
    assert base64.b64decode(embedded) == (tmp_path / 'figures' / 'case_best.png').read_bytes()


def test_captions_of_figures_are_sentences(page):
    captions = re.findall(r'<figcaption>(?!<i)(.*?)</figcaption>', page)
    assert captions == ['The three slices with most lesion of the study with the best Dice.']


def test_report_escapes_names(case_rows, tmp_path):
    case_rows[0]['study_id'] = name = '<script>alert("x")</script>'
    summary = {'protocols': scores.summarise(case_rows, [])}
    page = report.write_report(tmp_path, summary, case_rows, [], {'input': name}).read_text()
    assert name not in page
    assert html.unescape(page).count(name) == 4  # the run; the case's row, key and text


def test_report_shows_the_strata_and_the_views_worst_first(page):
    assert 'Studies by infection of the lungs' in page
    # Infection 0.25 %: three Dice of 0.125, 0.5 and 0.875.
    assert re.search(r'<td>&lt; 1 %</td><td class="number">3</td><td class="number">0\.500', page)
    views = json.loads(re.search(r'type="application/json">(.*?)</script>', page, re.S).group(1))
    assert [view['study_id'] for view in views] == ['study_0256', 'study_0257']
    assert 'Of 4 cases the 2 worst' in page
