"""English slot values and wrappers of the embedded command set (see `commands.py`)."""

from __future__ import annotations

WRAPPERS = """
@imperative
train {} | {} | {} | please {} | can you {} | could you {} | {} please | hey, {}
  | I'd like you to {} | {} right now
validation {} | would you {} | go ahead and {} | I need you to {}
test {} | {} | I want you to {} | quick, {} | do me a favor and {} | {} if you can
@other
train {} | {} | hey, {} | ok, {} | {}, thanks
validation {} | {} | hello, {}
test {} | {} | hi there, {} | right, {} | {}, thank you
"""

SLOTS = """
@time
train 6 am | 7 am | 6:30 | quarter past seven | half past five | 5:45 am | eight o'clock | 10:15
  | 9 in the evening | noon | ten to four
validation 8:10 | a quarter to nine | 5:05 am | eleven tonight
test 7:20 | four fifty | half past eight | nine thirty | 6:55 am | twenty past three
@duration
train 5 minutes | ten minutes | half an hour | 45 seconds | an hour | 20 minutes | two hours
  | 90 seconds
validation 12 minutes | three hours | 30 seconds
test 8 minutes | a quarter of an hour | seventy seconds | 25 minutes | ninety minutes
@person
train Anna | Mom | David | my boss | Sarah | Uncle Joe | Michael | the dentist | Emily | my brother
  | Kevin | Doctor Lee
validation Laura | my neighbor | Thomas | Grandpa
test Priya | my landlord | Oliver | Aunt May | Hannah | the plumber | Diego
@message
train I'm running late | happy birthday | dinner is ready | see you tomorrow | the meeting moved
  | I got home safely | good luck today | we need milk
validation the train is delayed | thanks for the gift | meet me outside
test I just landed | the keys are under the mat | congratulations on the baby | stuck at work again
  | save me a seat
@place
train the airport | Central Park | the nearest gas station | home | 12 Oak Street | the office
  | the train station | Joe's Diner | the city museum | the pharmacy
validation the stadium | the public library | 40 Hill Road
test the Hilton hotel | the closest supermarket | Pier 39 | grandma's house | the town hall
  | 7 Baker Street
@song
train Yesterday | Bohemian Rhapsody | Thriller | some jazz | Hotel California | Rolling in the Deep
  | classical piano | Wake Me Up | my workout playlist | Imagine
validation Billie Jean | Call Me Maybe | smooth blues
test Purple Rain | a little bit of reggae | Shape of You | Light My Fire | the Beatles
  | Dancing Queen
@city
train London | Paris | New York | Chicago | Tokyo | Madrid | Boston | Seattle | Rome | Berlin
validation Oslo | Denver | Toronto
test Lisbon | Sydney | Vienna | San Diego | Prague | Dublin
@day
train tomorrow | Monday | Friday afternoon | next week | the 5th of May | Sunday morning | Tuesday
validation Wednesday | the 9th of June | Saturday night
test Thursday | the 21st of March | this weekend | the day after tomorrow
@event
train a dentist appointment | lunch with Sarah | a team meeting | yoga class | a job interview
  | the parents' evening | a haircut
validation the car inspection | a piano lesson | the budget review
test a dinner with the Smiths | the product launch | an eye exam | book club | a flight to Miami
@task
train buy milk | water the plants | pay the rent | take my pills | call the bank | feed the cat
  | pick up the kids | send the report | check the oven
validation walk the dog | renew my passport | lock the garage
test turn off the sprinkler | return the library books | ring the vet | defrost the chicken
  | take out the trash | charge the camera
@note
train the door code is 4312 | gift ideas for Emily | the wifi password is sunflower
  | my shoe size is 42 | parking spot B17 | we owe Kevin ten dollars
validation the paint color is ivory | shirt size medium | gate C4
test the locker number is 208 | the recipe needs two eggs | blood type is O positive
  | the spare key hangs behind the shed
@phrase
train good morning | where is the bathroom | thank you very much | how much does it cost
  | I am allergic to nuts | nice to meet you
validation the bill please | I'm lost | see you soon
test is this seat taken | I would like a coffee | cheers | my luggage is missing
@language
train Spanish | French | German | Japanese | Chinese | Italian
validation Dutch | Greek
test Korean | Portuguese | Turkish | Swedish
@expression
train 15 times 4 | 20 percent of 80 | 144 divided by 12 | 37 plus 58 | 9 squared | 1000 minus 365
validation 18 times 7 | the square root of 81 | 5 percent of 60
test 23 times 6 | 15 percent of 240 | 96 divided by 8 | 412 plus 99 | 7 cubed
@room
train kitchen | living room | bedroom | hallway | bathroom | garage
validation study | guest room
test basement | dining room | nursery | attic
@temperature
train 20 degrees | 72 degrees | 68 degrees | 18 degrees | 75 degrees | 65 degrees
validation 23 degrees | 70 degrees
test 21 degrees | 66 degrees | 19 degrees | 74 degrees
@app
train Maps | Gmail | Spotify | WhatsApp | YouTube | Chrome | Instagram | Calendar | Netflix
  | Camera
validation Telegram | Slack | Reddit
test Facebook | Twitter | Duolingo | Photoshop | TikTok | Zoom
@topic
train electric cars | vegan recipes | the French revolution | hiking boots | solar panels
  | climate change | black holes | cheap laptops
validation sourdough bread | space travel | home insurance
test ancient Egypt | yoga for beginners | artificial intelligence | used bicycles | the gold rush
@subject
train the budget | our holiday plans | the invoice | the new contract | next week's schedule
validation the office party | the broken printer
test the annual report | the refund | our wedding invitation | the sales numbers
@amount
train 20 dollars | fifty bucks | 15 euros | 100 dollars | 8 dollars | 35 euros
validation 12 dollars | sixty euros
test 45 dollars | ten pounds | 230 dollars | 75 cents
@dish
train a pepperoni pizza | two cheeseburgers | chicken noodles | a large salad | sushi | fried rice
  | pad thai
validation a burrito | fish and chips | ramen
test tacos | a family box of wings | spring rolls | a veggie lasagna | dumplings
@podcast
train The Daily | Science Weekly | Serial | Planet Money | Radiolab
validation Hidden Brain | Invisibilia
test Freakonomics | This American Life | Stuff You Should Know | Hardcore History
@company
train Apple | Tesla | Microsoft | Amazon | Toyota | Google
validation Nvidia | Boeing
test Intel | Ford | Disney | Siemens
@team
train the Lakers | Real Madrid | the Yankees | Manchester United | the Bulls | Juventus
validation the Celtics | Arsenal
test the Red Sox | Barcelona | the Warriors | Liverpool
"""
