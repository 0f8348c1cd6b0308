"""English held-out phrasings of the embedded command set; `commands.py` explains the format.

They share few words with the training phrasings on purpose, and borrow words of other
intents: a model has to know what a sentence means, not which words it holds.
"""

from __future__ import annotations

INTENTS = """
@alarm_set
validation !make sure I'm awake by {time} | I must be on my feet by {time}, so make some noise then
test !create an alarm for {time} | alarm for {time} | !add a new alarm at {time}
  | can my alarm ring at {time} | !have the alarm go off at {time} | !get me out of bed at {time}
@alarm_cancel
validation no alarm tomorrow | !take the {time} alarm off my list
test !turn off the {time} alarm | I don't need the {time} alarm anymore | !switch the alarm off
  | !get rid of my {time} alarm | !drop the {time} alarm | let me sleep in, no wake-up call
@timer_start
validation I need a timer of {duration} | !run the egg clock for {duration}
test !count down {duration} | !start a countdown of {duration} | !tell me when {duration} are up
  | !put {duration} on the clock | !give me a countdown, {duration} | !beep after {duration}
@timer_check
validation !show the remaining time | !read out what remains of the countdown
test how long until the timer ends | is the timer still running
  | how many minutes are left on the timer | how far along is the timer
  | will the countdown be over soon
@call_start
validation !ring {person} | let me have a word with {person} by telephone
test !dial {person} | I want to talk to {person} on the phone | !give {person} a ring
  | !place a call to {person} | !give {person} a call | !get {person} on the line
@call_decline
validation !ignore the incoming call | whoever that is calling, turn them away
test !reject this call | don't answer the phone | !drop the call | !stop the phone call
  | !disconnect the call | don't pick up
@message_send
validation !write {person} {message} | !chat {person} the words {message}
test !tell {person} {message} | !send {person} a text, {message}
  | I want to text {person} that {message} | !let {person} know by text that {message}
  | !drop {person} a message, {message} | !inform {person} that {message}
@message_read
validation !check my inbox for texts | !say aloud what {person} sent
test !read the text from {person} | any unread messages | !open my unread texts
  | did {person} send me a message | !go through my new texts | has anybody written to me
@navigate
validation !start navigation to {place} | how can I walk to {place} from here
test how do I get to {place} | !show me the way to {place} | directions to {place}
  | !map the way to {place} | what's the best way to {place} | which roads lead to {place}
@traffic_check
validation how busy are the roads right now | is the road to {place} clear
test is there traffic on the way | any accidents on the road to {place}
  | are there jams near {place} | how many minutes by car to {place} | is the highway jammed
  | are cars backed up around {place}
@taxi_book
validation !request a cab to {place} | !summon a Lyft to {place}
test !get me an Uber to {place} | !order a taxi | !hail a cab | I want a taxi to {place}
  | !reserve a cab to {place} | !have a driver take me to {place}
@music_play
validation !listen to {song} | some {song} would be nice to dance to
test I want to hear {song} | !play some music, {song} | !turn on {song} | let's hear {song}
  | !throw on {song} | I'm in the mood for {song}
@music_pause
validation !pause playback | !interrupt this track until I'm back
test !stop playing | !turn off the music | no more music | !stop the song for a minute
  | !freeze the track | !cut the music
@music_next
validation I don't like this song, skip it | !forward to the following tune
test !play the next track | !skip ahead | next track | !skip to the following track
  | !jump to the next track | !play something else instead of this
@volume_up
validation !turn the sound up | !amplify it
test louder | !increase the volume | !volume up | it's too quiet | !crank it up
  | !put the volume higher
@volume_down
validation !turn the sound down | the neighbors will complain, hush the speakers a little
test quieter | !decrease the volume | !volume down | !reduce the sound | !bring the volume down
  | my ears hurt, it's blaring
@dnd_on
validation !block notifications for {duration} | !hush every alert while I nap
test !enable do not disturb | don't disturb me | !switch to silent mode
  | no notifications for {duration} | !stop all alerts for {duration}
  | I'm in a meeting, let nothing buzz
@dnd_off
validation !exit silent mode | no need to hush the phone any longer
test !unmute my notifications | !turn notifications back on | !take the phone off silent
  | !let notifications through again | !stop silencing my phone | !allow alerts again
@weather
validation !show the weather for {day} | how humid does it get in {city}
test weather forecast for {city} | is it going to snow in {city} | is it sunny in {city}
  | do I need an umbrella {day} | is a storm coming to {city}
  | should I take a coat when I go out in {city}
@wifi_on
validation I need wifi | stop using my data plan, there is a hotspot here
test !switch on the wireless network | wifi on | !start wifi | !put the wifi on
  | !join the home wifi
@wifi_off
validation I don't need wifi | no more wireless internet for now
test !switch off the wireless network | wifi off | !stop wifi | !shut down the wifi
  | !kill the wireless
@bluetooth_on
validation !switch on bluetooth | !let the keyboard and the tablet find each other
test !pair my headphones | bluetooth on | I need bluetooth for my headset | !connect my earbuds
  | !link up with my wireless headset
@bluetooth_off
validation !switch off bluetooth | stop talking to the wireless earphones
test !unpair my headphones | bluetooth off | I don't need bluetooth | !disconnect my earbuds
  | !cut the link to my headset
@brightness_up
validation the screen is too dark | the display should shine more
test !make the screen brighter | !raise the screen brightness | !brighten the display
  | !set brightness to maximum | !light up the display more | it's too dark to read this text
@brightness_down
validation the screen is too bright | !darken the panel
test !make the screen darker | !lower the screen brightness | !set brightness to minimum
  | brightness down | !tone down the screen light | this panel is blinding me at night
@flashlight_on
validation !light the torch | the power is out, I need a beam from the phone
test flashlight on | I need a flashlight | !activate the torch | it's dark in here, give me a light
  | !shine the flashlight | give me some torch light
@flashlight_off
validation !stop the torch | !end the beam from my phone
test flashlight off | I don't need the flashlight anymore | !deactivate the torch
  | no more flashlight | !kill the torch
@photo_take
validation I want to take a picture | !get {person} in the frame and shoot
test !take a selfie | !shoot a photo | !photograph this | picture of us | !snap a selfie
  | !get a shot of {person}
@photos_show
validation !display the photos of {person} | I'd like to view old images of {person}
test !show pictures of {person} | I want to see my pictures | !show me the album from {city}
  | !bring up my photos of {person} | let me look back at our trip to {city}
@video_record
validation !start the video camera | action, let's start the footage
test !film this | !shoot a video of {person} | video recording on | !make a video of {person}
  | !get this moving scene on tape
@screenshot
validation !grab the screen | !keep an image of this chat window
test !screenshot this | screenshot | !make a screen capture | !snap the screen | !save a screenshot
@calendar_add
validation !book {event} in my calendar for {day} | !reserve a slot {day}, it's {event}
test !put {event} on {day} | new appointment {day}, {event} | !set up {event} on {day}
  | !make a calendar entry for {event} on {day} | !block time {day} for {event}
@calendar_query
validation am I free {day} | how packed is {day} for me
test !show my schedule for {day} | what are my appointments {day} | !read my agenda for {day}
  | what do I have planned {day} | am I busy {day}
  | could I take on something else {day}, or is it full
@reminder_add
validation reminder, {task} | !bug me about this at {time}, {task}
test !remind me at {time} to {task} | I need to remember to {task}
  | !create a reminder for {time}, {task} | I must not forget to {task}
  | !make sure I remember to {task} | !tell me later that I have to {task}
@note_add
validation !save a note, {note} | for my records, {note}
test !write down {note} | !create a new note saying {note} | new note, {note}
  | !start a memo, {note} | !jot this down, {note}
@translate
validation what's the {language} for {phrase} | I want to tell a waiter in {language}, {phrase}
test what is {phrase} in {language} | !say {phrase} in {language}
  | how would I say {phrase} in {language} | !give me {phrase} in {language}
  | {phrase}, what would a {language} speaker say
@calculate
validation {expression} equals what | what do I get from {expression}
test how much is {expression} | !work out {expression} | !open the calculator, {expression}
  | !figure out {expression} | !solve {expression}
@lights_on
validation it's dark in the {room} | I'm walking into the {room}, so the bulbs should glow
test lights on in the {room} | !light up the {room} | I need light in the {room} | {room} light on
  | !brighten the {room} | I can't see a thing in the {room}
@lights_off
validation the {room} is too bright | no lamps in the {room}, I want to sleep there
test lights off in the {room} | !put out the {room} light | {room} light off
  | !make the {room} dark | !kill the lights in the {room}
@thermostat_set
validation I want the {room} at {temperature} | the AC should hold {temperature} indoors
test !make it {temperature} in the {room} | !change the temperature to {temperature}
  | !cool the {room} to {temperature} | thermostat {temperature}
  | !bring the {room} to {temperature} | I'm freezing, get the {room} to {temperature}
@app_open
validation I want to use {app} | !put {app} on the screen
test !start {app} | !go to {app} | !bring up {app} | !switch to {app} | !fire up {app}
  | !load {app}
@app_close
validation !kill {app} | !swipe {app} away
test !exit {app} | !shut down {app} | !force stop {app} | !close the {app} window | !leave {app}
  | {app} hangs, shut it
@app_install
validation !add {app} to my phone | my friends all have {app}, I want it as well
test !get {app} from the app store | I want to download {app}
  | !find {app} in the store and install it | !fetch {app} from the store
  | I don't have {app} yet, grab it
@app_uninstall
validation I don't want {app} on my phone | !strip {app} from my device
test !remove {app} from my phone | !get rid of {app} | !take {app} off my phone
  | !wipe {app} from the phone | {app} wastes storage, throw it out
@web_search
validation !browse the internet for {topic} | !type {topic} into a search engine
test !look up {topic} online | !find information about {topic} | !look for {topic} on the internet
  | !find websites about {topic} | what does the internet say on {topic}
@email_send
validation !mail {person} about {subject} | !forward something on {subject} to {person} by mail
test !write an email to {person} regarding {subject} | new email to {person}, subject {subject}
  | !draft an email for {person} on {subject} | !send {person} mail about {subject}
  | !put together a mail for {person} concerning {subject}
@pay
validation !make a payment of {amount} to {person} | !Venmo {person} {amount}
test !transfer {amount} to {person} | !give {person} {amount} | !wire {amount} to {person}
  | !pay back {amount} to {person} | !settle my debt of {amount} with {person}
@food_order
validation !have {dish} delivered to my home | the family wants {dish}, find someone who delivers
test !get me {dish} delivered | I'm hungry, get {dish} | !buy {dish} for dinner
  | !get takeout, {dish} | my stomach is growling, {dish} would do
@battery_check
validation is my phone charged | should I look for a charger
test !check the battery | how full is the battery | do I need to charge my phone
  | what percent is my phone at | can my phone survive until tonight without a plug
@contact_add
validation !save this number as {person} | {person} is missing from my phone book
test !create a new contact for {person} | !store {person} as a contact
  | !add a phone number for {person} | !make {person} a contact
  | !enter {person} into the address book
@podcast_play
validation I want to listen to the {podcast} podcast | !catch me up on {podcast} episodes
test !start the {podcast} podcast | !resume my podcast {podcast}
  | !continue the last episode of {podcast} | !listen to the newest {podcast} episode
  | did {podcast} release a show this week, let me hear it
@news
validation what's happening in the world | how do journalists cover {topic} this morning
test !tell me the headlines | any news on {topic} | !give me today's headlines
  | !play the news about {topic} | what are the papers reporting on {topic}
@stock_price
validation is {company} up today | how did {company} close on the exchange
test {company} share price | how much is a share of {company} | !tell me what {company} shares cost
  | how are {company} shares trading | did {company} rise on Wall Street
@sports_score
validation are {team} winning | who scored for {team}
test who won the {team} match | score for {team} | !show the {team} result
  | what was the result of {team} yesterday | were {team} beaten
@phone_find
validation !help me find my phone | I've looked everywhere, the mobile is gone
test !ring my phone so I can find it | !locate my phone | !make my phone ring, I lost it
  | !track down my phone | I misplaced my phone
@airplane_on
validation !activate airplane mode | !set the device for the flight
test airplane mode on | !put my phone in flight mode | I'm boarding, airplane mode
  | !start flight mode | the plane is about to depart, go offline
@hotel_book
validation hotel in {city} {day} | we want beds for the night in {city}
test I need a hotel room in {city} | !get me a hotel in {city} | !book two nights in {city}
  | !find me a room in {city} | I need somewhere to sleep in {city}
@oos
validation how tall is Mount Everest | do you have feelings | iron my shirts | who wrote Hamlet
  | good night, dear | turn off the sun | what's the history of {city} | is {dish} healthy
  | why are {topic} popular | book me a seat on a comet | what is {person} afraid of
  | find me true love | when was {company} started
test what makes you happy | knock knock | clean the bathroom floor | mow the lawn
  | play hide and seek with {person} | call off the wedding of {person}
  | which river flows through {city} | when was {city} built | compose a limerick about {topic}
  | how old is {person} | set me up on a date with {person} | nice weather makes me smile
  | are cats smarter than dogs | open a bank for {person} | light travels how fast
  | give {person} a hug | do fish sleep | my heart is broken | why do people enjoy {dish}
  | what's your favorite color | teach me to juggle
"""
