"""The pages as a person uses them, in a real browser without a window."""

import os
import shutil

import pytest
from selenium import webdriver
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.wait import WebDriverWait

from covseg_jax.imaging.studies import find_inputs
from covseg_jax.predict.studies import Extras, predict_studies
from tests.imaging.chest import write_study
from tests.predict.test_report import predict, write_scans
from tests.predict.test_uncertainty import TWO


@pytest.fixture(scope='module')
def browser():
    driver = shutil.which('chromedriver')
    if driver is None:
        # Where every change is tested, it must be tested whole.
        assert not os.environ.get('CI'), 'chromedriver is missing; install chromium-driver'
        pytest.skip('no chromedriver (Debian: apt-get install chromium chromium-driver)')
    options = webdriver.ChromeOptions()
    for argument in (
        'headless=new',
        'no-sandbox',
        'disable-dev-shm-usage',
        'window-size=1300,1200',
    ):
        options.add_argument(f'--{argument}')
    options.set_capability('goog:loggingPrefs', {'browser': 'ALL'})
    found = webdriver.Chrome(options=options, service=Service(driver))
    yield found
    found.quit()


@pytest.fixture
def opened(browser, report_path):
    browser.get(report_path.as_uri())
    yield browser
    assert browser.get_log('browser') == []


def wait_for(browser, shown):
    """Until the viewer shows 'study number-of-slice'."""
    viewer = browser.find_element(By.ID, 'viewer')
    WebDriverWait(browser, 10).until(lambda _: viewer.get_attribute('data-shown') == shown)


def press(browser, key):
    browser.find_element(By.TAG_NAME, 'body').send_keys(key)


def table_column(browser, column):
    return [
        row.find_elements(By.TAG_NAME, 'td')[column].text
        for row in browser.find_elements(By.CSS_SELECTOR, '#cases tbody tr')
    ]


def count_colour(browser, panel):
    """Pixels of a panel that are not grey."""
    return browser.execute_script(
        'const {width, height} = document.querySelectorAll("#panels canvas")[arguments[0]];'
        'const copy = new OffscreenCanvas(width, height).getContext("2d");'
        'copy.drawImage(document.querySelectorAll("#panels canvas")[arguments[0]], 0, 0);'
        'const all = copy.getImageData(0, 0, width, height).data;'
        'let found = 0;'
        'for (let i = 0; i < all.length; i += 4) found += Math.abs(all[i] - all[i + 2]) > 20;'
        'return found;',
        panel,
    )


def test_table_sorts_both_ways_and_keeps_the_undefined_last(opened):
    worst_first = ['study_0256', 'study_0255', 'study_0257', 'study_0258']
    assert table_column(opened, 0) == worst_first
    dice = opened.find_element(By.XPATH, '//table[@id="cases"]//button[.="Dice"]')
    dice.click()
    assert table_column(opened, 0) == ['study_0257', 'study_0255', 'study_0256', 'study_0258']
    assert table_column(opened, 2) == ['0.875', '0.500', '0.125', '–']
    dice.click()
    assert table_column(opened, 0) == worst_first


def test_first_column_stays_while_the_table_scrolls(opened):
    left, scrolled = opened.execute_script(
        'const box = document.getElementById("cases").parentElement;'
        'box.scrollLeft = 400;'
        'const cell = document.querySelector("#cases tbody td");'
        'return [cell.getBoundingClientRect().left - box.getBoundingClientRect().left,'
        ' box.scrollLeft];'
    )
    assert scrolled > 0  # at 1,300 pixels the columns do not fit
    assert left == 0


def test_slices_move_by_key_and_slider(opened):
    wait_for(opened, 'study_0256 2')  # where most lesion is
    press(opened, Keys.ARROW_RIGHT)
    wait_for(opened, 'study_0256 3')
    for _ in range(5):
        press(opened, Keys.ARROW_LEFT)
    wait_for(opened, 'study_0256 0')
    slider = opened.find_element(By.ID, 'slice')
    slider.send_keys(Keys.END)
    wait_for(opened, 'study_0256 5')
    assert '(6 of 6)' in opened.find_element(By.ID, 'place').text


def test_overlay_is_drawn_and_taken_away(opened):
    wait_for(opened, 'study_0256 2')
    assert count_colour(opened, 0) == 64  # the truth's 8 × 8 voxels
    press(opened, 'o')
    assert count_colour(opened, 0) == 0
    press(opened, 'o')
    assert count_colour(opened, 1) == 100  # the prediction's 10 × 10


def test_cases_are_turned_by_key_and_by_a_click_on_their_row(opened):
    wait_for(opened, 'study_0256 2')
    press(opened, 'n')
    wait_for(opened, 'study_0257 2')
    press(opened, 'n')  # it is the last
    press(opened, 'p')
    wait_for(opened, 'study_0256 2')
    row = opened.find_element(By.CSS_SELECTOR, 'tr[data-study="study_0257"]')
    row.click()
    wait_for(opened, 'study_0257 2')
    assert 'shown' in row.get_attribute('class')


def test_nothing_is_fetched(opened):
    wait_for(opened, 'study_0256 2')
    fetched = opened.execute_script(
        'return performance.getEntriesByType("resource").map(each => each.name)'
    )
    assert [name for name in fetched if not name.startswith('data:')] == []


def test_page_of_predictions_shows_a_study_its_outlines_and_its_facts(browser, tmp_path):
    write_scans(tmp_path / 'scans')
    predict(tmp_path / 'scans', tmp_path)
    browser.get((tmp_path / 'report.html').as_uri())
    first = table_column(browser, 0)[0]
    viewer = browser.find_element(By.ID, 'viewer')
    WebDriverWait(browser, 10).until(lambda _: viewer.get_attribute('data-shown'))
    assert viewer.get_attribute('data-shown').split()[0] == first
    both = count_colour(browser, 0)
    press(browser, 'l')
    lungs = count_colour(browser, 0)
    press(browser, 'u')
    assert both > lungs > count_colour(browser, 0) == 0
    browser.find_element(By.CSS_SELECTOR, 'tr[data-study="b"]').click()
    WebDriverWait(browser, 10).until(lambda _: viewer.get_attribute('data-shown')[0] == 'b')
    facts = [each.text for each in browser.find_elements(By.CSS_SELECTOR, '[data-facts]')]
    (shown,) = filter(None, facts)  # of what is hidden there is no text
    assert shown.startswith('b: CT-0')
    # Nothing lies beside the window, and nothing is fetched.
    assert browser.execute_script('return document.body.scrollWidth <= window.innerWidth')
    assert browser.get_log('browser') == []


def test_what_one_network_alone_marks_is_drawn_and_taken_away(browser, tmp_path):
    write_study(tmp_path / 'scans', 'a', lesion=False)
    studies = find_inputs(tmp_path / 'scans')
    predict_studies(studies, TWO, tmp_path, num_workers=0, wanted=Extras(report=True))
    browser.get((tmp_path / 'report.html').as_uri())
    viewer = browser.find_element(By.ID, 'viewer')
    WebDriverWait(browser, 10).until(lambda _: viewer.get_attribute('data-shown'))
    # It opens on a slice that both mark; one alone marks those below the middle of the opacity.
    press(browser, Keys.ARROW_LEFT * 2)
    for key in 'lu':
        press(browser, key)
    assert count_colour(browser, 0) > 10
    press(browser, 'd')
    assert count_colour(browser, 0) == 0
    assert browser.get_log('browser') == []
