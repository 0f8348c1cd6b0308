"""What the phone agent does for each intent of the embedded command set.

The slots of a command are added as further arguments: `app_open` with app Maps becomes
`do(action="Launch", app="Maps")`.
"""

from __future__ import annotations

OOS = "oos"


def _set(setting: str, value: str) -> dict[str, str]:
    return {"action": "Set", "setting": setting, "value": value}


def _do(action: str, **arguments: str) -> dict[str, str]:
    return {"action": action, **arguments}


ACTIONS: dict[str, dict[str, str]] = {
    "airplane_on": _set("airplane_mode", "on"),
    "alarm_cancel": _do("CancelAlarm"),
    "alarm_set": _do("SetAlarm"),
    "app_close": _do("Close"),
    "app_install": _do("Install"),
    "app_open": _do("Launch"),
    "app_uninstall": _do("Uninstall"),
    "battery_check": _do("Get", value="battery"),
    "bluetooth_off": _set("bluetooth", "off"),
    "bluetooth_on": _set("bluetooth", "on"),
    "brightness_down": _set("brightness", "down"),
    "brightness_up": _set("brightness", "up"),
    "calculate": _do("Calculate"),
    "calendar_add": _do("AddEvent"),
    "calendar_query": _do("ShowEvents"),
    "call_decline": _do("HangUp"),
    "call_start": _do("Call"),
    "contact_add": _do("AddContact"),
    "dnd_off": _set("do_not_disturb", "off"),
    "dnd_on": _set("do_not_disturb", "on"),
    "email_send": _do("SendEmail"),
    "flashlight_off": _set("flashlight", "off"),
    "flashlight_on": _set("flashlight", "on"),
    "food_order": _do("OrderFood"),
    "hotel_book": _do("BookHotel"),
    "lights_off": _do("Home", device="light", value="off"),
    "lights_on": _do("Home", device="light", value="on"),
    "message_read": _do("ReadMessages"),
    "message_send": _do("SendMessage"),
    "music_next": _do("Media", value="next"),
    "music_pause": _do("Media", value="pause"),
    "music_play": _do("PlayMusic"),
    "navigate": _do("Navigate", app="Maps"),
    "news": _do("ReadNews"),
    "note_add": _do("AddNote"),
    "pay": _do("Pay"),
    "phone_find": _do("FindPhone"),
    "photo_take": _do("TakePhoto", app="Camera"),
    "photos_show": _do("ShowPhotos", app="Photos"),
    "podcast_play": _do("PlayPodcast"),
    "reminder_add": _do("AddReminder"),
    "screenshot": _do("Screenshot"),
    "sports_score": _do("Get", value="score"),
    "stock_price": _do("Get", value="stock_price"),
    "taxi_book": _do("BookTaxi"),
    "thermostat_set": _do("Home", device="thermostat"),
    "timer_check": _do("Get", value="timer"),
    "timer_start": _do("StartTimer"),
    "traffic_check": _do("Get", value="traffic"),
    "translate": _do("Translate"),
    "video_record": _do("RecordVideo", app="Camera"),
    "volume_down": _set("volume", "down"),
    "volume_up": _set("volume", "up"),
    "weather": _do("Get", value="weather"),
    "web_search": _do("Search", app="Browser"),
    "wifi_off": _set("wifi", "off"),
    "wifi_on": _set("wifi", "on"),
}
