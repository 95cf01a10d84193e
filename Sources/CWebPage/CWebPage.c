#include "CWebPage.h"

/* SwiftPM's own way to compile resources in, .embedInCode, makes an array literal of each: 23 s for 100 KB, and no folders. */
#pragma clang diagnostic ignored "-Wc23-extensions"

/* A file of the page is added here and in the table; a test compares them with the directory. */
static const unsigned char announce_js[] = {
#embed "../Web/Page/announce.js"
};
static const unsigned char app_js[] = {
#embed "../Web/Page/app.js"
};
static const unsigned char ask_js[] = {
#embed "../Web/Page/ask.js"
};
static const unsigned char console_css[] = {
#embed "../Web/Page/console.css"
};
static const unsigned char console_html[] = {
#embed "../Web/Page/console.html"
};
static const unsigned char console_js[] = {
#embed "../Web/Page/console.js"
};
static const unsigned char display_js[] = {
#embed "../Web/Page/display.js"
};
static const unsigned char dom_js[] = {
#embed "../Web/Page/dom.js"
};
static const unsigned char feed_js[] = {
#embed "../Web/Page/feed.js"
};
static const unsigned char format_js[] = {
#embed "../Web/Page/format.js"
};
static const unsigned char icon_svg[] = {
#embed "../Web/Page/icon.svg"
};
static const unsigned char index_html[] = {
#embed "../Web/Page/index.html"
};
static const unsigned char plot_js[] = {
#embed "../Web/Page/plot.js"
};
static const unsigned char rows_js[] = {
#embed "../Web/Page/rows.js"
};
static const unsigned char section_evacuation_js[] = {
#embed "../Web/Page/section-evacuation.js"
};
static const unsigned char section_guests_js[] = {
#embed "../Web/Page/section-guests.js"
};
static const unsigned char section_history_js[] = {
#embed "../Web/Page/section-history.js"
};
static const unsigned char section_host_js[] = {
#embed "../Web/Page/section-host.js"
};
static const unsigned char section_moves_js[] = {
#embed "../Web/Page/section-moves.js"
};
static const unsigned char section_trouble_js[] = {
#embed "../Web/Page/section-trouble.js"
};
static const unsigned char session_js[] = {
#embed "../Web/Page/session.js"
};
static const unsigned char style_css[] = {
#embed "../Web/Page/style.css"
};
static const unsigned char terminal_js[] = {
#embed "../Web/Page/terminal.js"
};

static const struct xd_page_file files[] = {
    {"announce.js", announce_js, sizeof announce_js},
    {"app.js", app_js, sizeof app_js},
    {"ask.js", ask_js, sizeof ask_js},
    {"console.css", console_css, sizeof console_css},
    {"console.html", console_html, sizeof console_html},
    {"console.js", console_js, sizeof console_js},
    {"display.js", display_js, sizeof display_js},
    {"dom.js", dom_js, sizeof dom_js},
    {"feed.js", feed_js, sizeof feed_js},
    {"format.js", format_js, sizeof format_js},
    {"icon.svg", icon_svg, sizeof icon_svg},
    {"index.html", index_html, sizeof index_html},
    {"plot.js", plot_js, sizeof plot_js},
    {"rows.js", rows_js, sizeof rows_js},
    {"section-evacuation.js", section_evacuation_js, sizeof section_evacuation_js},
    {"section-guests.js", section_guests_js, sizeof section_guests_js},
    {"section-history.js", section_history_js, sizeof section_history_js},
    {"section-host.js", section_host_js, sizeof section_host_js},
    {"section-moves.js", section_moves_js, sizeof section_moves_js},
    {"section-trouble.js", section_trouble_js, sizeof section_trouble_js},
    {"session.js", session_js, sizeof session_js},
    {"style.css", style_css, sizeof style_css},
    {"terminal.js", terminal_js, sizeof terminal_js},
};

struct xd_page_file xd_page_file_at(size_t index) {
    if (index < sizeof files / sizeof files[0]) return files[index];
    return (struct xd_page_file){NULL, NULL, 0};
}
