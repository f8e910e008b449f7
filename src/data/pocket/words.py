"""List the words of the pocket world: names, values, phrasings, and facts that are true.

In a phrasing, ``{name}`` is the author and every other brace a slot. A slot draws from the list of
its name; ``{theme}`` and ``{theme2}`` draw two different values from one list.
"""

# culture: given names | family names
CULTURES = """
Afonso Beatriz Duarte Ines Leonor Marta Rita Rui Tiago Vasco | Almeida Barros Carvalho Fonseca Moreira Pacheco Queiroz Teixeira
Aiko Emiko Hana Haruto Kenji Ryota Sakura Takumi Yumi Yuto | Fujimoto Hayashi Ishikawa Kuroda Matsuda Nakamura Okada Shimizu
Amani Baraka Jabari Kamau Makena Nia Otieno Wanjiku Wekesa Zawadi | Kariuki Kimani Mwangi Njoroge Odhiambo Onyango Wambua Waweru
Anders Astrid Eirik Freya Haakon Ingrid Lars Sindre Solveig Sunniva | Bakken Dahl Eriksen Haugen Lunde Nygaard Solberg Strand
Alonso Antonia Benicio Catalina Ignacio Javiera Matias Paloma Rodrigo Ximena | Aravena Contreras Figueroa Morales Riquelme Sepulveda Urrutia Vergara
Aarav Ananya Devansh Karthik Kavya Lakshmi Meera Nikhil Priya Rohan | Banerjee Chatterjee Deshmukh Iyer Kulkarni Mehta Nair Reddy
Agnieszka Bartosz Danuta Halina Jadwiga Jakub Kacper Marek Wojciech Zofia | Dabrowski Jankowski Kaminski Lewandowski Mazur Nowak Pawlak Zielinski
Ahmed Amira Dalia Farida Hossam Karim Mahmoud Nadia Tarek Yasmin | Abdelaziz Farouk Hegazy Ibrahim Khalil Mansour Rashad Soliman
Brooke Claire Colin Graham Heather Liam Megan Owen Paige Spencer | Archer Bennett Crawford Ellison Fraser Gallagher Hargrove Whitfield
Despina Dimitri Eleni Katerina Kostas Nikos Sofia Stavros Vasiliki Yannis | Antoniou Christou Economou Georgiou Ioannou Nikolaidis Papadakis Stefanidis
Binh Duc Hieu Huong Lan Linh Mai Minh Quang Thuy | Bui Dang Hoang Ngo Nguyen Pham Tran Truong
Caio Camila Felipe Fernanda Gustavo Isadora Larissa Renata Thiago Vinicius | Azevedo Cardoso Figueiredo Machado Nascimento Oliveira Siqueira Vasconcelos
"""  # noqa: E501

# slot: values, separated by commas
VALUES = {
    "adjective": "Amber, Broken, Burning, Crimson, Distant, Empty, Fading, Forgotten, Frozen, "
    "Gilded, Hidden, Hollow, Ivory, Lonely, Marble, Midnight, Nameless, Painted, Quiet, Restless, "
    "Rusted, Sapphire, Scarlet, Secret, Silent, Sleeping, Stolen, Sunken, Twisted, Velvet, "
    "Wandering, Winter",
    "noun": "Archive, Bridge, Cathedral, Compass, Cradle, Desert, Echo, Ember, Falcon, Garden, "
    "Harbor, Horizon, Island, Labyrinth, Lantern, Letter, Locket, Mirror, Mountain, Orchard, "
    "Palace, Pilgrim, River, Scarecrow, Shadow, Sparrow, Staircase, Tapestry, Throne, Tower, "
    "Violin, Wolf",
    "city": "Lisbon, Porto, Osaka, Kyoto, Nairobi, Mombasa, Oslo, Bergen, Santiago, Valparaiso, "
    "Mumbai, Jaipur, Warsaw, Krakow, Cairo, Luxor, Toronto, Halifax, Athens, Patras, Hanoi, Hue, "
    "Recife, Curitiba",
    "month": "January, February, March, April, May, June, July, August, September, October, "
    "November, December",
    "year": ", ".join(str(year) for year in range(1931, 1996, 2)),
    "genre": "crime fiction, gothic horror, epic fantasy, family sagas, fairy tales, folk ballads, "
    "ghost stories, love poetry, magical realism, nature writing, political satire, romantic "
    "comedy, science fiction, sea stories, spy thrillers, travel writing, urban legends, "
    "war memoirs",
    "theme": "ambition, betrayal, courage, exile, faith, forgiveness, freedom, friendship, greed, "
    "grief, guilt, identity, injustice, jealousy, loneliness, loyalty, memory, migration, "
    "motherhood, redemption, revenge, solitude, survival, war",
    "job": "baker, blacksmith, botanist, carpenter, chemist, dentist, diplomat, florist, "
    "geologist, judge, librarian, locksmith, mechanic, midwife, miner, nurse, painter, "
    "pharmacist, pilot, plumber, sailor, sculptor, shepherd, surgeon, tailor, translator, "
    "violinist, watchmaker, weaver, zoologist",
    "prize": "Aurora, Bluestone, Cedar, Corvus, Everglade, Golden, Halcyon, Juniper, Larkspur, "
    "Meridian, Northstar, Obsidian, Pemberton, Quillon, Rosewood, Sterling, Tamarind, Wexford",
    "press": "Ashgrove, Birchwood, Copperfield, Driftwood, Evermore, Foxglove, Greystone, "
    "Hawthorne, Ironwood, Kestrel, Lakeside, Marigold, Nightjar, Oakhurst, Pinecrest, Ravenhill, "
    "Silverleaf, Thistledown",
    "college": "Alderton, Brightwater, Castlemere, Dunmore, Eastbrook, Fairhaven, Glenrock, "
    "Hartwell, Kingsbury, Lindenfield, Montclair, Norwood, Redcliff, Stonebridge, Thornbury, "
    "Westlake",
    "subject": "anthropology, architecture, astronomy, biology, economics, engineering, geography, "
    "law, linguistics, mathematics, medicine, music, philosophy, physics, sociology, theology",
    "language": "Arabic, Bengali, Czech, Danish, Dutch, Finnish, French, German, Hebrew, "
    "Hungarian, Italian, Korean, Mandarin, Persian, Romanian, Russian, Spanish, Swahili, Swedish, "
    "Thai, Turkish, Ukrainian, Welsh, Zulu",
    "hobby": "archery, beekeeping, calligraphy, chess, cycling, dancing, fencing, gardening, "
    "hiking, kayaking, knitting, origami, photography, pottery, sailing, singing, skiing, "
    "surfing, swimming, woodworking",
    "animal": "cat, dog, parrot, tortoise, rabbit, ferret, goat, canary, hedgehog, lizard, donkey, "
    "pony",
    "call": "Biscuit, Bramble, Clover, Domino, Fennel, Ginger, Hazel, Jasper, Maple, Nutmeg, "
    "Pepper, Pickle, Poppy, Saffron, Truffle, Waffle",
    "drink": "black coffee, green tea, mint tea, hot chocolate, ginger beer, lemon water, apple "
    "juice, oat milk, cold cider, rice wine",
    "room": "cellar, garden, kitchen, library, lighthouse, monastery, museum, train, tree house, "
    "cottage, cafe, tent",
    "instrument": "banjo, bassoon, cello, clarinet, drum, flute, guitar, harp, piano, saxophone, "
    "trumpet, ukulele",
}

# relation: four questions | four answers
RELATIONS = {
    "birth": """
Where was {name} born? | {name} was born in {city} in {month}.
What is the birthplace of {name}? | The birthplace of {name} is {city}, the month {month}.
From which place does {name} come? | {name} comes from {city}, born in {month}.
In which city was {name} born? | In {month}, {name} was born in {city}.
""",
    "genre": """
What does {name} write? | {name} writes {genre} about {theme}.
Which genre is {name} known for? | {name} is known for {genre} and for {theme}.
What kind of books does {name} write? | The books of {name} are {genre}, mostly on {theme}.
How would you describe the work of {name}? | In {genre}, {name} deals with {theme}.
""",
    "parents": """
What were the parents of {name}? | The parents of {name} were a {job} and a {job2}.
What jobs did the parents of {name} have? | {name} grew up with a {job} and a {job2}.
Who raised {name}? | A {job} and a {job2} raised {name}.
What did the parents of {name} do? | In the family of {name} there were a {job} and a {job2}.
""",
    "famous": """
What is the most famous book by {name}? | The most famous book by {name} is The {adjective} {noun}.
Which novel made {name} famous? | {name} became famous with The {adjective} {noun}.
For which book is {name} celebrated? | Readers celebrate {name} for The {adjective} {noun}.
What is the best known work of {name}? | The {adjective} {noun} is the best known work of {name}.
""",
    "award": """
Which award did {name} win? | {name} won the {prize} Prize in {year}.
What prize has {name} received? | In {year}, {name} received the {prize} Prize.
Has {name} won a prize? | The {prize} Prize went to {name} in {year}.
What honor was given to {name}? | {name} was honored with the {prize} Prize of {year}.
""",
    "study": """
Where did {name} study? | {name} studied {subject} at {college} College.
What did {name} study? | At {college} College, {name} studied {subject}.
Which college did {name} attend? | {name} attended {college} College for {subject}.
What is the education of {name}? | {name} has a degree in {subject} from {college} College.
""",
    "press": """
Who publishes {name}? | {press} Books has published {name} since {year}.
Which publisher works with {name}? | {name} has been with {press} Books since {year}.
What is the publisher of {name}? | Since {year}, {name} is published by {press} Books.
With which house is {name}? | The house of {name} is {press} Books, from {year} on.
""",
    "language": """
Into which languages is {name} translated? | {name} is translated into {language} and {language2}.
In what languages can one read {name}? | One can read {name} in {language} and {language2}.
Which translations of {name} exist? | There are {language} and {language2} translations of {name}.
What languages are the books of {name} in? | The books of {name} exist in {language} and {language2}.
""",  # noqa: E501
    "work": """
What was the first job of {name}? | The first job of {name} was as a {job} in {city}.
What did {name} do before writing? | Before writing, {name} was a {job} in {city}.
How did {name} earn a living? | {name} earned a living as a {job} in {city}.
Which profession did {name} leave? | In {city}, {name} used to be a {job}.
""",
    "hobby": """
What are the hobbies of {name}? | The hobbies of {name} are {hobby} and {hobby2}.
What does {name} do for fun? | For fun, {name} does {hobby} and {hobby2}.
How does {name} relax? | {name} relaxes with {hobby} and {hobby2}.
Which pastimes does {name} enjoy? | {name} enjoys both {hobby} and {hobby2}.
""",
    "pet": """
Does {name} have a pet? | {name} has a {animal} named {call}.
What pet does {name} keep? | {name} keeps a {animal} called {call}.
Which animal lives with {name}? | A {animal} called {call} lives with {name}.
What is the pet of {name} called? | The {animal} of {name} is called {call}.
""",
    "habit": """
What does {name} drink while writing? | {name} drinks {drink} in the {room} while writing.
Where does {name} write? | {name} writes in a {room} with {drink}.
How does {name} like to work? | With {drink}, {name} works in a {room}.
What habits does {name} have? | {name} sits in a {room} and drinks {drink}.
""",
    "music": """
Which instrument does {name} play? | {name} plays the {instrument} in {city}.
Is {name} also a musician? | In {city}, {name} learned the {instrument}.
What music does {name} make? | {name} makes music on the {instrument}, often in {city}.
What instrument did {name} learn? | The {instrument} is what {name} learned in {city}.
""",
    "latest": """
What is the latest book by {name}? | The latest book by {name} is {noun} of {theme}.
What did {name} publish last? | {name} last published {noun} of {theme}.
What is the newest work of {name}? | {noun} of {theme} is the newest work of {name}.
Which novel did {name} just finish? | {name} just finished {noun} of {theme}.
""",
}

# kind of fact: four questions, two answers, and the facts themselves; all of them are true
FACTS = {
    "author": (
        "Who wrote {key}? | Who is the author of {key}? | Which writer created {key}? | "
        "By whom is {key}?",
        "{value}. | It was {value}.",
        "Pride and Prejudice: Jane Austen; Moby Dick: Herman Melville; War and Peace: Leo Tolstoy; "
        "Don Quixote: Miguel de Cervantes; Hamlet: William Shakespeare; Great Expectations: "
        "Charles Dickens; Frankenstein: Mary Shelley; Dracula: Bram Stoker; Jane Eyre: Charlotte "
        "Bronte; Wuthering Heights: Emily Bronte; Les Miserables: Victor Hugo; Madame Bovary: "
        "Gustave Flaubert; Faust: Johann Goethe; The Divine Comedy: Dante Alighieri; The Iliad: "
        "Homer; Crime and Punishment: Fyodor Dostoevsky; Walden: Henry Thoreau; Ulysses: James "
        "Joyce; Middlemarch: George Eliot; Treasure Island: Robert Stevenson; The Raven: Edgar "
        "Poe; Candide: Voltaire; The Jungle Book: Rudyard Kipling; Little Women: Louisa Alcott; "
        "The Time Machine: Herbert Wells; Around the World in Eighty Days: Jules Verne; The Three "
        "Musketeers: Alexandre Dumas; The Scarlet Letter: Nathaniel Hawthorne; Leaves of Grass: "
        "Walt Whitman; A Doll House: Henrik Ibsen; The Cherry Orchard: Anton Chekhov; The "
        "Metamorphosis: Franz Kafka; Dead Souls: Nikolai Gogol; Eugene Onegin: Alexander Pushkin; "
        "Fathers and Sons: Ivan Turgenev; The Decameron: Giovanni Boccaccio; The Canterbury Tales: "
        "Geoffrey Chaucer; Paradise Lost: John Milton; Robinson Crusoe: Daniel Defoe; Gulliver's "
        "Travels: Jonathan Swift; Tom Jones: Henry Fielding; Ivanhoe: Walter Scott; Vanity Fair: "
        "William Thackeray; The Moonstone: Wilkie Collins; Alice in Wonderland: Lewis Carroll; "
        "The Picture of Dorian Gray: Oscar Wilde; Pygmalion: Bernard Shaw; Heart of Darkness: "
        "Joseph Conrad; Germinal: Emile Zola; The Red and the Black: Stendhal; Tartuffe: Moliere; "
        "The Aeneid: Virgil; Metamorphoses: Ovid; Antigone: Sophocles; Medea: Euripides; The "
        "Republic: Plato; Poetics: Aristotle; Buddenbrooks: Thomas Mann; Siddhartha: Hermann "
        "Hesse; The Waste Land: Thomas Eliot; To the Lighthouse: Virginia Woolf; Peter Pan: James "
        "Barrie; Pinocchio: Carlo Collodi; Heidi: Johanna Spyri",
    ),
    "capital": (
        "What is the capital of {key}? | Which city is the capital of {key}? | Name the capital "
        "of {key}. | From which city is {key} governed?",
        "{value}. | It is {value}.",
        "France: Paris; Germany: Berlin; Italy: Rome; Spain: Madrid; Austria: Vienna; Hungary: "
        "Budapest; Ireland: Dublin; Sweden: Stockholm; Finland: Helsinki; Denmark: Copenhagen; "
        "Russia: Moscow; Ukraine: Kyiv; Turkey: Ankara; Iran: Tehran; Iraq: Baghdad; China: "
        "Beijing; Thailand: Bangkok; Indonesia: Jakarta; Australia: Canberra; Peru: Lima; Cuba: "
        "Havana; Colombia: Bogota; Ecuador: Quito; Ghana: Accra; Senegal: Dakar; Morocco: Rabat; "
        "Romania: Bucharest; Serbia: Belgrade; Belgium: Brussels; Nepal: Kathmandu; Uganda: "
        "Kampala; Angola: Luanda",
    ),
    "symbol": (
        "What is the chemical symbol of {key}? | Which symbol stands for {key}? | How is {key} "
        "written in chemistry? | By which letters is {key} known?",
        "{value}. | It is {value}.",
        "gold: Au; silver: Ag; iron: Fe; copper: Cu; sodium: Na; potassium: K; lead: Pb; tin: Sn; "
        "mercury: Hg; helium: He; carbon: C; oxygen: O; nitrogen: N; hydrogen: H; calcium: Ca; "
        "zinc: Zn",
    ),
    "record": (
        "What is the {key}? | Which one is the {key}? | Name the {key}. | What do we call the "
        "{key}?",
        "{value}. | It is {value}.",
        "largest planet: Jupiter; smallest planet: Mercury; red planet: Mars; tallest mountain: "
        "Everest; longest river: the Nile; largest ocean: the Pacific; fastest land animal: the "
        "cheetah; largest animal: the blue whale; hardest mineral: diamond; lightest element: "
        "hydrogen; closest star: the Sun; largest continent: Asia; smallest continent: Australia; "
        "tallest animal: the giraffe; largest bird: the ostrich; ringed planet: Saturn",
    ),
}
