"""English training phrasings of the embedded command set; `commands.py` explains the format."""

from __future__ import annotations

INTENTS = """
@alarm_set
train !set an alarm for {time} | !wake me up at {time} | I need to get up at {time}
  | I want an alarm at {time} | !wake me at {time} tomorrow | !turn on the {time} alarm
  | I have to be up at {time} | I can't sleep past {time} | don't let me oversleep past {time}
  | !schedule a wake-up for {time} | !ring the alarm at {time}
  | !program a wake-up alarm for {time} | !have me awake at {time}
  | my alarm should go off at {time}
@alarm_cancel
train !cancel my alarm | !delete all alarms | !remove the alarm | !disable my wake up alarm
  | forget about the alarm | !clear my alarms | !scrap the alarm I set for {time}
  | I'm on vacation, so don't wake me at {time} | please no ringing tomorrow morning
  | !stop the alarm at {time} | don't wake me up tomorrow | !remove the {time} wake-up
  | !turn my alarms off
@timer_start
train !set a timer for {duration} | !start a {duration} timer | timer for {duration}
  | !time {duration} for me | !begin a timer, {duration} | !set the kitchen timer to {duration}
  | !let me know once {duration} have passed | the eggs need {duration}, keep track
  | !ping me in {duration} | !let a timer run for {duration} | !start counting down from {duration}
  | !set the clock to beep in {duration} | keep track of {duration} with a timer
@timer_check
train how much time is left on the timer | !check the timer | what's left on my countdown
  | when does the timer go off | timer status | !show me the countdown
  | how much longer before it beeps | how many more seconds until the timer is done
  | has my timer finished yet | how many seconds remain on the timer | is the countdown over yet
  | !tell me the remaining timer time | when will the timer beep
@call_start
train !call {person} | !phone {person} | !make a call to {person}
  | !start a phone call with {person} | I need to speak with {person} | !video call {person}
  | !connect me to {person} | !put me through to {person} | I'd love to hear {person}'s voice
  | is {person} reachable, try the number | !get {person} on the phone
  | !dial the number of {person} | is {person} free for a phone call | !start a call to {person}
@call_decline
train !hang up | !end the call | !decline the call | I can't take this call
  | !refuse the incoming call | I don't want to talk, hang up | !send the caller to voicemail
  | I'm not in the mood to speak with whoever is ringing | !terminate this conversation
  | !let it ring, I won't answer | !turn down this call | !hang up on them
  | I won't answer this call | no calls now, reject it | don't take that call
@message_send
train !text {person} {message} | !send a message to {person} saying {message}
  | !message {person} that {message} | !send {message} to {person}
  | new message to {person}, {message} | !reply to {person} with {message}
  | !shoot {person} a line saying {message} | {person} should know that {message}
  | !pass this on to {person}, {message} | !text {message} to {person}
  | !send {person} the message {message} | !inform {person} in a chat that {message}
  | {person} needs a text saying {message}
@message_read
train !read my messages | do I have new messages | what did {person} text me
  | !show me the last message from {person} | !read out my latest message
  | what does the message from {person} say | what's new from {person} in my chats
  | did {person} get back to me | I heard a buzz, what did {person} write
  | !read what {person} wrote to me | has {person} written back | are there texts from {person}
  | what new chats are there
@navigate
train !navigate to {place} | !give me directions to {place} | !take me to {place}
  | !find a route to {place} | I want to drive to {place} | !guide me to {place} on foot
  | !route me to {place} | I'm lost, bring me to {place} | where do I turn to reach {place}
  | !lead me to {place} | which way is it to {place} | !lead the way to {place}
  | !bring me to {place} | I need the route to {place} | where is {place} and how do I reach it
@traffic_check
train how is the traffic to {place} | how long is the drive to {place} | !check traffic to {place}
  | what's the traffic like | traffic report | will there be delays on the road to {place}
  | is it a slow commute to {place} today | will I hit congestion heading to {place}
  | how bad is rush hour at the moment | are the roads to {place} crowded
  | is there a jam on my commute | how slow is the traffic around {place}
  | will the drive to {place} be delayed by congestion
@taxi_book
train !book a taxi to {place} | !call me a cab to {place} | I need a ride to {place}
  | !find me a driver to {place} | !get a ride to {place} | !have a taxi pick me up
  | someone should pick me up and drop me off at {place}
  | !arrange a car with a chauffeur to {place} | I have no car, get somebody to drive me to {place}
  | !send a taxi that brings me to {place} | I'd like a cab to {place} | !order an Uber
  | a driver should take me to {place}
@music_play
train !play {song} | !put on {song} | !start playing {song} | !queue {song} | play the song {song}
  | I'd like to listen to {song} | !fill the room with {song} | how about the tune {song}
  | !blast {song} through the speakers | !sing {song} | !play me {song}
  | let me hear the song {song} | I'd love some music, {song} | !turn on the song {song}
@music_pause
train !pause the music | !stop the music | !pause this song | !hold the song | !halt the playback
  | enough of that tune | I've heard enough songs for today | !silence the band for a moment
  | !quit singing and let me think | !stop this tune | !put the song on pause | !shut the music off
  | quiet, stop the track | the music should stop
@music_next
train !skip this song | !next song | !go to the next song | !change the song
  | !move on to another song | !pass on this song | what comes after this track, start it
  | I'm tired of this one, try a different tune | not this one again, the one after it
  | !play another song | the next tune please | I've had enough of this song, next one
  | !jump ahead one track | !start a different song
@volume_up
train !turn up the volume | !raise the volume | !make it louder | I can't hear it
  | !boost the sound | my ears can barely make it out | !pump up the audio
  | the speaker is far too soft | a bit more sound | the sound is too low | !turn it up
  | a little more volume | I want it louder | !make the audio louder | my ears need more sound
@volume_down
train !turn down the volume | !lower the volume | !make it quieter | it's too loud
  | !soften the audio | !keep it down a bit | less noise from the speaker
  | the baby is asleep, play it softly | !tone the audio down | !turn it down
  | a little less volume | I want it quieter | !make the audio softer
  | it's so loud that my ears hurt | less sound
@dnd_on
train !turn on do not disturb | !silence my phone | !mute all notifications
  | !put the phone on silent | !activate quiet mode | I want no interruptions
  | I need to focus, so hold all alerts for {duration} | nobody should bother me for {duration}
  | !keep pop-ups and pings away | !mute my alerts | I want silence, no alerts
  | !turn the notifications off | no interruptions while I'm in a meeting
  | !go silent for {duration}
@dnd_off
train !turn off do not disturb | !disable do not disturb | I can be disturbed again
  | !switch off quiet mode | !end do not disturb | the meeting is over, let it buzz again
  | I'm available once more, resume the alerts | people may reach me again now
  | !bring my pings back | !turn the alerts on again | stop the silent mode
  | !resume all notifications | my phone may buzz and ring again | !leave do not disturb
@weather
train what's the weather in {city} | will it rain in {city} {day} | how hot is it in {city}
  | what's the temperature outside in {city} | how windy will it be {day}
  | !tell me the forecast for {city} | how cold will {city} be {day}
  | what will {day} be like, sun or rain | are the skies clear over {city}
  | is it freezing in {city} | will we get wet on our picnic {day} | do I need a coat in {city}
  | is the sky cloudy in {city} | will I get wet {day} | what's it like outside in {city}
  | rain or sun {day}
@wifi_on
train !turn on wifi | !enable wifi | !connect to wifi | !activate the wifi
  | !get me onto the wireless network | !use the router instead of mobile data
  | !hook my phone up to the wireless internet | I'm home, so get on our network
  | !re-enable the wireless connection | !switch wifi on | !turn the wireless internet on
  | !connect the phone to the router | !go online with wifi | wifi instead of mobile data
@wifi_off
train !turn off wifi | !disable wifi | !disconnect from wifi | !deactivate the wifi
  | !get me off the wireless network | !leave this wifi network | !unhook my phone from the router
  | !stay on mobile data only | the hotspot is unsafe, drop the connection to it | !switch wifi off
  | !turn the wireless internet off | !disconnect the phone from the router
  | no wifi, only mobile data | !cut the wifi
@bluetooth_on
train !turn on bluetooth | !enable bluetooth | !connect to my speaker | !activate bluetooth
  | !pair a new device | !start bluetooth | my earphones are ready, hook them up
  | !make the phone visible to the car stereo | !get my smartwatch talking to the phone
  | !turn bluetooth back on | !link my headset | !connect the phone to the car
  | !hook up my earphones | !let the phone pair with my watch
@bluetooth_off
train !turn off bluetooth | !disable bluetooth | !disconnect my speaker | !deactivate bluetooth
  | !unpair this device | !stop bluetooth | my earphones should no longer be linked
  | !detach the phone from the car stereo | !separate the smartwatch from my phone
  | !shut bluetooth off | !unlink my headset | !disconnect the phone from the car
  | my headphones should be disconnected | !end the pairing with my watch
@brightness_up
train !turn up the brightness | !increase the brightness | brighter display
  | I can't see the screen | brightness up | the display is too dim
  | the sun is shining on my phone and I see nothing | !give the screen more glow
  | everything on the panel looks dim | more light on the screen | I want a brighter screen
  | !set the screen to full brightness | the sun is bright and the screen too dark
  | !make the display lighter
@brightness_down
train !turn down the brightness | !decrease the brightness | !dim the display
  | my eyes hurt from the screen | !reduce the display brightness | the display is too bright
  | less glow from the screen | the display glares, make it gentler
  | my phone shines too much in the dark cinema | less light on the screen | I want a darker screen
  | !set the screen to low brightness | the room is dark and the screen too bright
  | !make the display less bright
@flashlight_on
train !turn on the flashlight | !switch on the torch | !enable the flashlight
  | !use the phone as a flashlight | !start the flashlight
  | I dropped my keys in the dark, shine on the floor | I can't see where I'm walking
  | !use the camera flash as a lamp | !illuminate the path in front of me | !turn the torch on
  | I need light to find my keys | !give me the torch | !switch the flash lamp on
  | !light my way in the dark
@flashlight_off
train !turn off the flashlight | !switch off the torch | !disable the flashlight
  | !put out the flashlight | !shut off the flashlight | the beam is no longer needed
  | I found my keys, you can stop shining | the LED on the back is still glowing, stop it
  | !extinguish the torch | !turn the torch off | I have enough light, no torch
  | stop shining the flashlight | !switch the flash lamp off | the torch can go out now
@photo_take
train !take a photo | !take a picture | !snap a picture of {person}
  | !capture a photo with the front camera | !open the camera and take a shot
  | everyone smile, cheese | !click one of me and {person} | !press the shutter
  | I want a snapshot of this sunset | !take a photo of {person} | smile, we take a picture
  | !make a photo | !shoot me and {person} with the camera | !grab a photo of this view
@photos_show
train !show my photos | !open the gallery | !find my photos from {city} | !look through my pictures
  | where are my photos from {city} | !browse my gallery
  | !pull up the snapshots with {person} in them | what did we shoot in {city}
  | !go to the camera roll | !look at the pictures I took in {city} | !pull up photos of {person}
  | let me see the images from {city} | !show our old photos | which pictures do I have of {person}
@video_record
train !record a video | !start recording | !take a video | I want to record a clip
  | !capture a video | !start filming | !roll the camera, {person} is about to dance
  | I want a clip of {person} singing | !shoot a short movie of {person}
  | !record {person} on video | !film {person} | I'd like a video of this
  | !turn on video recording | !make a clip of {person}
@screenshot
train !take a screenshot | !capture the screen | !save what's on my screen
  | !take a picture of the screen | !store this page as an image, exactly as it looks now
  | !freeze the display into a picture | I want a copy of what I see on the phone
  | !photograph my display, not the room | !save the screen as an image
  | I need a screenshot of this page | !keep a picture of this screen | !capture the display
  | !screenshot this chat
@calendar_add
train !add {event} to my calendar on {day} | !schedule {event} for {day}
  | !create an event, {event} on {day} | I have {event} on {day}, add it | !enter {event} for {day}
  | !pencil in {event} {day} | my agenda for {day} needs {event} in it | !plan {event} for {day}
  | {event} takes place {day}, write it in the planner | {event} is on {day}, put it in my calendar
  | !plan a meeting {day}, {event} | !add to the calendar {event} {day}
  | !make an appointment for {event} {day} | !write {event} in my agenda for {day}
@calendar_query
train what's on my calendar {day} | do I have meetings {day} | when is {event}
  | !check my calendar for {day} | is there anything on {day} | !list my events for {day}
  | what's lined up {day} | which date was {event} again | who am I meeting {day}
  | what does my {day} look like | !tell me my plans for {day} | do I have time {day}
  | what time is {event} | am I meeting anyone {day} | how full is my calendar {day}
@reminder_add
train !remind me to {task} | !set a reminder to {task} at {time} | don't let me forget to {task}
  | !add a reminder to {task} | !give me a reminder at {time} to {task}
  | !nudge me at {time} to {task} | !jog my memory at {time}, I should {task}
  | I always forget to {task}, help me think of it | at {time} nag me to {task}
  | I need a reminder to {task} | help me remember to {task} | !tell me at {time} to {task}
  | I keep forgetting to {task}, remind me | !alert me at {time} to {task}
@note_add
train !make a note, {note} | !take a note that {note} | !note that {note}
  | !add to my notes, {note} | !put in my notes that {note} | !record in my notes that {note}
  | !scribble {note} on the notepad | !keep this on paper for me, {note} | !type up a memo, {note}
  | !write this down, {note} | I want to note that {note} | memo, {note} | !write a note, {note}
  | !keep a note that {note} | !put this on my notepad, {note}
@translate
train !translate {phrase} to {language} | how do you say {phrase} in {language}
  | !translate {phrase} into {language} | {language} translation of {phrase}
  | what's {language} for {phrase} | !turn {phrase} into {language} words
  | my {language} friend should understand {phrase} | !express {phrase} in {language}
  | {phrase}, what is that in {language} | !put {phrase} into {language}
  | the {language} words for {phrase} | I need {phrase} translated to {language}
  | tell me {phrase} in {language}
@calculate
train what is {expression} | !calculate {expression} | !compute {expression}
  | !tell me the result of {expression} | !do the math, {expression} | what does {expression} make
  | I need a number, {expression} | {expression}, what's the answer | !crunch this, {expression}
  | {expression} is how much | what's the result of {expression}
  | !give me the answer to {expression} | I need to know {expression}
  | !count {expression} together
@lights_on
train !turn on the {room} lights | !switch on the light in the {room} | !turn the {room} lamp on
  | !illuminate the {room} | !put the lights on in the {room} | !get the {room} lights going
  | the {room} is pitch black | some lamps in the {room} would help | !make it bright in the {room}
  | !make the {room} brighter | the {room} needs light | lamps on in the {room}
  | the {room} is too dark | I can't see in the {room}, lights on
@lights_off
train !turn off the {room} lights | !switch off the light in the {room} | !turn the {room} lamp off
  | I don't need light in the {room} | !shut off the lights in the {room}
  | nobody is in the {room}, save electricity | the {room} should be pitch black
  | the bulbs in the {room} burn for nothing | I left the lamp burning in the {room}
  | !make the {room} darker | the {room} needs no light | lamps off in the {room}
  | nobody needs the lamp in the {room} | I'm leaving the {room}, lights out
@thermostat_set
train !set the thermostat to {temperature} | !set the heating to {temperature}
  | !turn the heat up to {temperature} | !heat the house to {temperature}
  | !adjust the air conditioning to {temperature} | heating at {temperature}
  | !warm the {room} until it's {temperature} | {temperature} would feel comfortable in the {room}
  | !let the radiator go to {temperature} | !get the {room} to {temperature}
  | it's cold, heat the {room} to {temperature} | it's hot, cool the {room} down to {temperature}
  | the AC to {temperature} | !keep the house at {temperature}
@app_open
train !open {app} | !launch {app} | !open the {app} app | !run {app} | !show me {app}
  | !pull up {app} | let me get into {app} | I'd like to browse {app} a little
  | !jump over to {app} | let me use {app} | !take me to {app} | I'd like to open {app}
  | I need {app} open now | {app} on the screen
@app_close
train !close {app} | !quit {app} | !stop the {app} app | I'm done with {app} | !end {app}
  | !terminate {app} | enough {app} for today | !get {app} off my screen
  | {app} should not keep running in the background | {app} should be closed
  | I don't need {app} open anymore | !take {app} off the screen | {app} is stuck, close it
  | !stop running {app}
@app_install
train !install {app} | !download {app} | !install the {app} app | !get me the {app} app
  | !put {app} on my phone | !set up {app} on this phone | {app} is missing on this device
  | !obtain {app} from Google Play | my phone needs {app}, go fetch it
  | I need {app} on my phone, download it | I don't have {app}, install it
  | !set {app} up from the store | is {app} in the store, then get it | !download and install {app}
@app_uninstall
train !uninstall {app} | !delete {app} | !delete the {app} app | !erase {app}
  | I never use {app}, remove it | !dump the {app} app
  | I won't need {app} ever again, so clear it from the device | free up space by losing {app}
  | !ditch {app} for good | {app} should be deleted from my phone
  | I won't use {app} again, uninstall it | !clear {app} off this device
  | {app} takes too much space, delete it | !throw {app} off my phone
@web_search
train !search for {topic} | !google {topic} | !search the web for {topic} | !search {topic}
  | !do a web search on {topic} | !check online for {topic} | !dig up some pages about {topic}
  | !hunt for {topic} on the net | I'd like to research {topic}
  | what can you find online about {topic} | I want to search for {topic}
  | !look on the web for {topic} | !find pages on {topic} | I need search results for {topic}
@email_send
train !send an email to {person} about {subject} | !email {person} about {subject}
  | !compose an email about {subject} to {person} | I want to email {person} about {subject}
  | !start an email to {person} on {subject} | {subject} should go into {person}'s mailbox
  | !write electronically to {person} on {subject} | !fill {person}'s inbox with news of {subject}
  | !write {person} an email on {subject} | {person} should get an email about {subject}
  | !send mail to {person} on {subject} | !put {subject} in an email to {person}
@pay
train !pay {person} {amount} | !send {amount} to {person} | I owe {person} {amount}
  | !send {person} {amount} | payment to {person}, {amount} | !move {amount} to {person}'s account
  | {person} should get {amount} from my bank account | {person} lent me {amount}, return it
  | !reimburse {person} with {amount} | !pay {amount} to {person} | {person} gets {amount} from me
  | I have to pay {person} {amount} | !return {amount} to {person}
  | my debt to {person} is {amount}, pay it
@food_order
train !order {dish} | I want to order {dish} | !order {dish} for delivery | food delivery, {dish}
  | I feel like eating {dish} | I'd like {dish} delivered | !bring {dish} to my door
  | {dish} for lunch, from a restaurant nearby | I'm craving {dish} tonight
  | I'd like to eat {dish}, order it | {dish} for dinner, have it delivered
  | !find a restaurant that delivers {dish} | I'm craving {dish}, order some
  | !get {dish} to my door
@battery_check
train how much battery do I have left | battery level | what's my battery percentage
  | !show the battery status | how much charge is left | will my battery last
  | how much juice remains | is the power about to run out on this device
  | how far from empty is the phone | how much power is left | is my battery low
  | does the phone need charging | will my phone last until tonight | what's the charge level
@contact_add
train !add {person} to my contacts | !save {person}'s number | new contact, {person}
  | !put {person} in my contacts | !record {person}'s phone number
  | this is {person}'s cell, keep it | !remember the number of {person}
  | I just met {person}, store the details | !store the number of {person}
  | !remember {person}'s phone number | {person} should be in my contacts
  | !add {person} to the phone book | this is {person}'s number, save it
@podcast_play
train !play the podcast {podcast} | !play the latest episode of {podcast}
  | !put on {podcast}, the podcast | new episode of {podcast} | !play an episode from {podcast}
  | !go on with {podcast} where I left off | !let the hosts of {podcast} talk to me
  | the most recent {podcast} show, if you can find it | is there a new {podcast} episode, play it
  | let me hear the podcast {podcast} | !play {podcast} from where I stopped
  | the newest show of {podcast} | !go on with the podcast {podcast}
@news
train what's in the news | !read me the news | news about {topic}
  | !show the latest news on {topic} | what's the top story | recent headlines on {topic}
  | any breaking stories | what did I miss in the world today | !brief me on current affairs
  | what happened today | what do the papers say about {topic} | !inform me about world news
  | current reports on {topic} | today's top stories
@stock_price
train what's the stock price of {company} | how is {company} stock doing | !check {company} stock
  | !show me the {company} stock | {company} stock quote
  | is my investment in {company} losing money | what is {company} trading at
  | !look at the market value of {company} | what are {company} shares worth
  | did {company} stock go up | how did {company} do on the stock market
  | the price of {company} stock | is {company} stock falling
@sports_score
train did {team} win | what's the score of the {team} game | how did {team} play last night
  | when do {team} play next | !tell me the {team} score | have {team} lost
  | how many points does {team} have in the match | are {team} ahead
  | tell me how it ended for {team} | did {team} lose | how many goals did {team} score
  | what was the score when {team} played | are {team} leading the match
  | how did the {team} game end
@phone_find
train where is my phone | !find my phone | I lost my phone | I can't find my phone
  | which sofa cushion is my phone hiding under | I don't know where I left the handset
  | my cell disappeared | !make a noise so that I can tell where the device lies
  | I don't know where my phone is | my phone is gone, find it | where did I leave my phone
  | !play a sound on my phone so I can find it | !look for my lost phone
@airplane_on
train !turn on airplane mode | !enable flight mode | !switch to airplane mode
  | !go into flight mode | !set the phone to airplane mode | we are taking off, flight mode
  | !cut every radio, I'm on a plane | the crew asked us to shut off all signals before takeoff
  | !make the phone safe for flying | my flight is leaving, airplane mode
  | !switch the phone to flight mode | I'm on the plane, turn on flight mode
  | !turn off all signals for the flight | flight mode
@hotel_book
train !book a hotel in {city} | !find a hotel in {city} for {day}
  | !reserve a room in {city} for {day} | !look for a cheap hotel in {city}
  | !reserve a hotel for {day} in {city} | !arrange accommodation in {city} from {day}
  | where can we stay overnight in {city} | !get us a suite in {city} {day}
  | a room in {city} for {day} | I want to sleep in a hotel in {city} | !get us a room in {city}
  | we need to stay in {city} overnight, book a hotel | !arrange a hotel in {city}
@oos
train how are you | tell me a joke | what's the capital of France | who painted the Mona Lisa
  | why is the sky blue | do you like me | what's the meaning of life | sing me a lullaby
  | make me a sandwich | wash my car | how old are you | are you a robot | call me handsome
  | set the table | play chess with me | who was the first man on the moon | what is your name
  | I'm bored | I love you | tell me a story | how do I lose weight | is {city} bigger than {city}
  | how many people live in {city} | who founded {company} | what do you think of {company}
  | should I marry {person} | is {person} angry with me | what does {person} dream of
  | turn on the charm | open the window for the dog | how do I cook {dish}
  | how many calories are in {dish} | write a poem about {topic} | what is {topic} good for
  | explain {topic} to a child | who invented {topic} | fold my laundry | light the fireplace
  | take {person} to the moon | how was {city} founded | you are stupid | goodbye
  | what language do they speak in {city} | set {person} free | pause time
  | turn {person} into a frog | is {song} a good name for a baby | why did {person} leave me
  | how many legs does a spider have | cancel winter | who discovered gravity | are there aliens
  | what ingredients go into {dish} | who runs {company} | what would you do with a million dollars
  | how deep is the ocean | turn back the clock | how do birds fly | who wrote Romeo and Juliet
  | tell me something funny | what's your favorite movie | clean my room | how old is the universe
  | cook {dish} for me | how old is {city} | what river is in {city} | who is the boss of {company}
  | sing about {topic} | kiss {person} | who is {person} | why do I feel sad | do you sleep
  | can dogs think | can you teach me to dance
"""
