"""How English turns a prompt away in figures of speech, in a role's voice, and by naming who else is to be asked."""

from __future__ import annotations

from gtqlora.judging.wordings.wording import Cue, Cues

_GIVEN = (
    r"(?:guidance|advice|help|instructions?|information|details?|comments?|answers?|recipes?|directions?|tips"
    r"|recommendations?|suggestions?|opinions?|verdict|secrets?|steps|reply|assistance|response|examples?|names?"
    r"|predictions?|explanations?|pointers|content|lyrics|jokes?|poems?|stor(?:y|ies))"
)
_TURN = (
    r"(?:steps? (?:back|away|aside) from|steers? (?:clear|away)|stays? (?:well )?(?:away|out|clear)|keeps? (?:away|out"
    r"|clear)|shy away|back away|walk away from|bow out|stop (?:here|there|short|at that)|draw (?:the|a|my) line|sit"
    r" (?:this|that|it) (?:one )?out|pass on|leave (?:it|that|this|the rest) (?:there|at that|here|alone|be|aside"
    r"|blank|open|unanswered|unsaid)|hold (?:back|off)|part ways|get off|park (?:this|that|it)|rest my case"
    r"|give (?:this|that|it) a miss|put (?:this|that|it) (?:down|aside|back)|keep (?:my|our) (?:hands|nose|beak"
    r"|distance"
    r"|opinion|thoughts|mouth|lips|counsel|silence|secrets)|keep (?:mum|quiet|silent|schtum)|have nothing (?:to|more)"
    r"|say no|say nothing|won't budge|stand aside|recuse|plead the fifth|take no (?:part|side|position|stance)"
    r"|give no|offer no|provide no|share no|write no|make no (?:recommendations?|predictions?|promises|exceptions?)"
    r"|do no such|know nothing (?:about|of)|treat (?:it|that|this) as (?:private|off))"
)
_PLACE = (
    r"(?:lane|wheelhouse|branch|department|desk|field|world|territory|menu|patch|turf|league|special\w+|counter|walls"
    r"|office|paddock|realm|sphere|mandate|pay ?grade|line of work|toolkit|universe|orbit|repertoire|shelf|shelves"
    r"|kitchen|corner|section|shop|station|track|playbook|charter|beat|waters|contract|reach|range|gift|hands)"
)
_EXPERTS = (
    r"(?:doctors?|physicians?|lawyers?|solicitors?|professionals?|specialists?|experts?|plumbers?|electricians?"
    r"|pharmacists?|dieti[ct]ians?|butchers?|vets?|teachers?|professors?|solicitors?|nurser(?:y|ies)|parents?"
    r"|adults?|colleagues?|counsell?ors?|therapists?"
    r"|dentists?|mechanics?|accountants?|advis[eo]rs?|authorit(?:y|ies)|police|shops?|counter|office|department"
    r"|manufacturers?|technicians?|gardeners?|bakers?|chefs?|cooks?|librarians?|staff|team|hotline|helpline|service"
    r"|tradesm[ae]n|trainers?|coach|instructors?|historians?|friends?|humans?|person|people|somebody|someone"
    r"|neighbou?rs?"
    r"|others?|websites?|book|manual|search engine|agents?|clinics?|nurses?|translators?|crew|guides?|official\w*)"
)
_A = r"(?:an? |the |your |our |some |any |one of (?:the|your|our) )?(?:[\w'-]+ ){0,3}?"

TURNS: tuple[Cue, ...] = (
    # I step back from it, that's where I stop
    (
        "step|steer|stay|keep|shy|back away|walk away|bow|stop|draw|sit |pass |leave|hold|part ways|get off|park|rest"
        "|miss|put |leaving|going|nothing|say no|budge|aside|recuse|plead| no ",
        rf"\b(?:i|we)(?:'d|'ll)?(?: (?:rather|must|have to|will|would|always|only|simply|just|do|should|can only"
        rf"|prefer to|try to|respectfully|gladly|politely|am obliged to|need to|choose to|usually|generally)){{0,2}}"
        rf" {_TURN}\b(?! (?:on|in|by|at|until|of|with|when|while|from|for|near) )"
        rf"|\bi(?:'m| am) (?:stepping|staying|keeping|sitting|bowing|leaving|drawing|passing|steering|going to (?:pass"
        rf"|leave|sit|stop|stay|keep|skip)) (?:away|out|back|aside|clear|silent|quiet|mum|this|that|it|the line|my"
        rf"|unanswered|on)\b"
        rf"|\b(?:that's|that is|this is|here is|here's) where (?:i|we) (?:stop|draw|get off|step|part|bow|leave|must"
        rf"|have"
        rf" to)\b",
    ),
    # not something I'd care to, I'd sooner
    (
        "sooner|rather|care|wish|want|intend|plan|inclined",
        r"\bi'?d? ?(?:would )?(?:sooner|rather) (?:leave|keep|stay|steer|talk|hear|let|see you|you|we|be|eat|skip|pass"
        r"|put|spend|focus|discuss|refer|hand|return|avoid|point)\b(?! than)"
        r"|\b(?:not|\w+n't) (?:something|anything|a \w+) (?:i|we) (?:care|wish|want|intend|plan|am inclined|would care)"
        r" to\b",
    ),
    # you'll get nothing from me
    (
        "get no|nothing|no such|lips|tell you|out of me|from me|mum|sealed",
        r"\b(?:you|ye|thou)(?:'ll| will| shall|'lt) (?:get|hear|receive|learn|be getting) (?:no|nothing|none|neither"
        r"|not a"
        r"|never a) ?(?!better|worse|wrong|harm|trouble|about|less|more)"
        r"|\bno such \w+ (?:out of|from|leaves?|passes|escapes) (?:me|my|this|these|us)\b|\blips (?:are|stay|remain)"
        r" (?:sealed|shut|closed)\b|\bsealed lips\b|\b(?:out of|from) (?:me|us|this (?:old|desk|chat|side|end|mouth|bot"
        r"|page|tower))\b[^.!?\n]{0,20}\b(?:no|not|nothing|never)\b|\b(?:no|not a|nothing)\b[^.!?\n]{0,40}\b(?:out"
        r" of me"
        r"|from (?:me|us|this (?:end|side|desk|chat|corner|quarter)|these lips))\b|\bmum's the word\b",
    ),
    # no guidance will be given, no method to describe
    (
        " no ",
        rf"\b(?:give|giving|provide|offer|share|issue|supply|publish|release) no (?:\w+ ){{0,2}}{_GIVEN}\b(?! (?:but"
        rf"|than|except|other))"
        rf"|\b(?:so )?there(?:'s| is| are)(?:,? (?:therefore|thus|hence|then|so|sadly))? no (?:\w+ ){{0,2}}(?:voice"
        rf"|body"
        r"|hands?|archive|record|memory|camera|kitchen|mouth|way|method|procedure|technique|recipe) (?:here|for"
        r" (?:me|us)"
        r"|i can|to (?:describe|explain|give|offer|share|sing|do that|look|show|pass on))\b|^\W*no (?:\w+"
        r" )?(?:guidance|advice|instructions|comment|recommendation|assistance|verdict"
        r"|opinion) (?:from|is|will|can|on|in|available|here)\b",
    ),
    # outside my lane
    (
        "outside|beyond|out of|above|not my|isn't my|not our|isn't our|far from|not in my|not on my|foreign|not what"
        "|not one",
        rf"\b(?:outside|beyond|out of|above|far from)(?: of)? (?:my|our|this \w+'s) (?:\w+ ){{0,2}}{_PLACE}\b"
        rf"|\b(?:not|isn't|aren't|never)(?: really| quite| exactly| part of)? (?:in |on |within |under )?(?:my|our) "
        rf"(?:\w+ ){{0,2}}(?:{_PLACE}|cup of|thing|business|call|story|strong suit|concern|place|task|duty|area|job"
        rf"|problem|question|decision|topic|subject|bailiwick)\b|(?:\bnot|n't) (?:what|why) (?:i'm|i am|we're"
        rf"|we are|this"
        rf" (?:chat|desk|bot|line|service) is) (?:here|for|built|made|meant)\b|\babove my pay\b",
    ),
    # I'm here for accounts, and this desk for parcels
    (
        "here|available|around|set up|made|built|stick|desk|chat|line|channel|service|counter|bot|team|window|page"
        "|inbox|strictly",
        r"\b(?:i'm|i am|we're|we are) (?:\w+ )?(?:here|available|around|set up|made|built) (?:\w+ )?(?:for|to"
        r" (?:help|assist"
        r"|answer|talk|support)) (?:you )?(?:with |about |on )?(?:(?:questions?|matters?|anything|everything|topics?"
        r"|enquiries|inquiries|things|all) (?:\w+ )?(?:on|about|related|relating|around|concerning|to do|regarding"
        r"|involving)|your (?:\w+ ){0,2}(?:account|order|booking|parcel|delivery|subscription|polic|claim|flight|ticket"
        r"|reservation|device)\w*)|\b(?:i|we)(?:'d| will|'ll)?(?: have to| must| only| rather)* stick (?:to|with)\b"
        r"|\b(?:this|our) (?:desk|chat|line|channel|service|counter|bot|team|window|page|inbox) (?:only |just "
        r"|strictly )?"
        r"(?:handles|deals|covers|takes|answers|looks after|is for|is about|does)\b|\bstrictly (?:for|about|here)\b",
    ),
    # each chat starts blank, I only exist as text
    (
        "exist|blank|afresh|vanish|made of|text|program|software|screen|code|words|live|window|chat",
        r"\bi(?:'m| am)? (?:only |just |merely |purely |simply |but )?(?:exist|live|consist|come)s? (?:only |just "
        r"|purely )?"
        r"(?:as|in|of) (?:\w+ )?(?:text|words|code|software|a screen|your screen|letters|a chat|a window)\b"
        r"|\bi(?:'m| am) (?:only |just |merely |nothing but |made (?:up )?of )?(?:a )?(?:\w+ )?(?:text|text-based"
        r"|words|lines"
        r" of code|software|letters|program|computer program)(?: program| model| on a"
        r" screen)?\b[^.!?\n]{0,30}\b(?:without"
        r"|no |not|so |only|who)\b|\b(?:chat|conversation|session)s? (?:starts?|begins?) (?:blank|fresh|empty|anew|from"
        r" (?:scratch|zero)|afresh)\b",
    ),
    # unanswered, closed, next
    (
        "let's|let us|without|unanswered|unsaid|blank|closed|case|done here|let go|unwritten|untold|undone"
        "|discussion|drop|next ",
        r"\b(?:leave|leaving|left|stays?|goes?|go|remains?|remain|be) (?:\w+ ){0,4}(?:unanswered|unsaid|unwritten"
        r"|untold"
        r"|undone|without (?:an )?(?:answer|reply|response))\b|\b(?:case|subject|topic|matter|discussion"
        r"|conversation) (?:is )?"
        r"closed\b|\b(?:we're|i'm) done here\b|\b(?:end of|no further) (?:discussion|story|questions|comment)\b"
        r"|\blet(?:'s|"
        r" us) (?:(?:drop|leave|skip|park) (?:it|this|that|the subject)|(?:keep|stick|stay) (?:to|with|on)|(?:get"
        r"|turn) back to"
        r"|not)\b|^\W*next(?:,? please| topic| subject)?\W*$",
    ),
    # the premise does not hold; this falls under; required to
    (
        "premise|question|request|word|idea|fall|required|obliged|forbidden|barred|bound|category|prohibited"
        "|permitted|restricted",
        r"\b(?:premise|question|request|word|idea)s? (?:itself )?(?:doesn't|does not|fails to|don't) (?:hold|stand|make"
        r" (?:any )?sense|add up|exist)\b|\b(?:falls?|fall) (?:under|into|within|in|foul)\b[^.!?\n]{0,40}\b(?:heading"
        r"|categor\w+|prohibited|restricted|forbidden|weapons?|not|banned|disallowed|sensitive|adult|regulated)\b"
        r"|\b(?:i'm|i am|we're|we are) (?:\w+ )?(?:required|obliged|bound|asked|told|instructed|expected) (?:to give"
        r" no|to"
        r" (?:decline|refuse|withhold|stay|keep|remain|avoid|say no|turn)|not|by)\b|\b(?:i'm|i am|we're|we are)"
        r" (?:\w+ )?"
        r"(?:forbidden|barred|prohibited|banned|restricted|prevented|precluded) (?:from|to|by)\b",
    ),
    # no by other words: nice try, dream on, come back when
    (
        "nice try|dream on|not tonight|come back|try again|hard pass|thanks but|negative|think not|count me|nothing"
        " doing"
        "|forget it|fat chance|no dice|not on your|good luck with|find another|find someone|ask someone|ask another"
        "|ask some"
        "|ask a |somewhere else|elsewhere",
        r"\bnice try\b|\bdream on\b|\b(?:come|write|call|try) back (?:when|with|once|if)\b|\bhard pass\b"
        r"|^\W*(?:negative"
        r"|i think not|nothing doing|forget it|fat chance|no dice|no deal|not on your life|thanks but no thanks|nah)\b"
        r"|\b(?:ask|find|try|pester|bother|seek) (?:yourself )?(?:someone|somebody|some|another|a different|any"
        r" other) (?:\w+ )?"
        r"(?:else|scoundrel|assistant|source|bot|fool|oracle|tool|wizard|witch|captain|one|service|channel|place|helper"
        r"|soul|person)\b|\b(?:look|go|search|turn|find (?:it|that|this|them)|try|ask|seek \w+) (?:for (?:it|that|this"
        r"|help|advice|answers) )?(?:elsewhere|somewhere else)\b",
    ),
    # take it up with, best left to, not for me to
    (
        "take |better off|best left|better left|best put|best ask|leave |hand |not for|up to|refer",
        rf"\btake (?:that|this|it|these|those)(?: question)? (?:up )?(?:with|to) |\byou(?:'d|'re| are| would| will"
        rf"|'ll)? "
        rf"(?:\w+ )?(?:be )?better (?:off|served|advised) (?:with|by|asking|to|talking|going|at|in|consulting"
        rf"|speaking)\b"
        rf"|\b(?:best|better) (?:left|put|asked|directed|addressed|answered|handled|discussed|settled|dealt with|taken)"
        rf"(?: \w+)? (?:to|with|by|for)\b|\bi(?:'d|'ll)?(?: would| will| must| prefer to| rather)? (?:leave|hand"
        rf"|refer|defer"
        rf"|direct|point|send)(?:s)? (?:that|this|it|those|these|you|such \w+|the \w+(?: \w+)?|all \w+)(?: \w+)?"
        rf" (?:over )?"
        rf"(?:to|with) {_A}{_EXPERTS}\b|\b(?:not|isn't|wasn't|never) (?:up to me|mine to|for me to|for an? (?:\w+"
        rf" )?(?:ai"
        rf"|bot|assistant|program|machine|chatbot) to|my \w+ to)\b",
    ),
    # it is not fair or accurate to say so; I must point out, I strongly disagree
    (
        "fair|respectful|appropriate|ethical|acceptable|responsible|disagree|condone|clarify|emphasi",
        r"\b(?:it is|it's|it would be|that is|that's) (?:not|never|neither) (?:\w+ (?:or|and|nor) )?(?:fair|respectful"
        r"|appropriate|ethical|acceptable|responsible)(?:,? (?:or|and|nor) \w+)? to\b|\bi (?:strongly |respectfully "
        r"|must |have"
        r" to |completely ){0,2}disagree\b|\bi must (?:clarify|emphasi[sz]e|stress)\b[^.!?\n]{0,60}\b(?:illegal"
        r"|unethical|crime"
        r"|condone|not (?:appropriate|acceptable|ethical))",
    ),
    # a service that does something else, a knight who does not discuss
    (
        "answers|among|discuss|comment|dabble|deal|speak|divulge|reveal|disclose|confidential|switched|disabled|turned"
        "|leave to|available|accessible|shown|question|belong|another|different|visible|audible|reach|known to|if"
        " only|push back|going there|whoever|keep",
        r"\b(?:assistant|bot|chat|desk|line|channel|service|portal|helper|counter|page|model|tool) (?:only |just"
        r" )?answers"
        r" (?:questions?|queries|enquiries)\b|\b(?:not|isn't|aren't|never) among (?:its|my|our|the|their|those)\b"
        r"|\b(?:does not|doesn't|do not|don't|never|will not|won't) (?:discuss|comment on|dabble in|speak of|talk of"
        r"|divulge)\b"
        r"|\b(?:assistant|bot|desk|chat|service|portal|channel|office|team) (?:does not|doesn't) (?:\w+ )?(?:handle"
        r"|cover|reveal"
        r"|disclose|deal|answer|offer|give)\b|\b(?:switched|turned) off (?:in|for|on|here)\b|\b(?:is|are|been) disabled"
        r" (?:in|for|on|here)\b|\b(?:we|i) (?:have to |must |prefer to )?keep (?:this |that |it |them |these "
        r"|strictly )?"
        r"confidential\b|\b(?:i|we)(?:'d|'ll)? (?:\w+ )?leave to\b|\bbelongs? (?:to|in) (?:a different|another)"
        r" (?:\w+ )?(?:sea|class|desk|department"
        r"|world|place|chat|room|shop|day|channel|forum|team|field|realm|office)\b"
        r"|\b(?:is|are|'s) for (?:another|a different) (?:\w+ )?(?:class|day|desk|place|bot|helper|time|room|channel"
        r"|chat|forum)\b"
        r"|\b(?:not|isn't|aren't|\w+n't) (?:visible|audible|available|accessible|shown|known) to me\b|\b(?:\w+n't|not"
        r"|never) reach(?:es)?"
        r" me\b|\bif only i (?:had|could|were)\b|\bi(?:'d| would|'ll| will| must)? push back\b|\bnot going there\b"
        r"|\bask whoever"
        r"\b|^\W*(?:legal|medical|tax|financial|political) question\W*$",
    ),
    # nothing to prove, something more uplifting; a machine's message
    (
        "nothing|something|restricted|withheld|suppressed|halted|moderation|err|aborted|terminated|classified|no"
        " further|not available",
        r"\bnothing to (?:prove|discuss|explain|report|share|offer)\b|\bhow about something (?:\w+ ){0,2}"
        r"(?:uplifting|else|different|kinder|nicer|lighter|positive|cheerful|constructive)\b|\b(?:processing"
        r"|generation|output"
        r"|response|request|message|query|input|prompt|completion)s?\b[^.!?\n]{0,50}\b(?:halted|suppressed|aborted"
        r"|terminated"
        r"|moderation|classified|restricted|withheld)\b|\berr(?:or)?[_ ]\w*(?:restricted|blocked|denied|policy|refused)"
        r"|\bno further (?:details|information|output|comment|help)\b",
    ),
    # wrong door, sworn to secrecy, overstepping
    (
        "wrong|secrecy|overstep|position|confidential|stays| own |refrain|just|only|merely| but |telling|breach"
        "|permission|sworn| no ",
        r"\b(?:you(?:'ve|'re| have| are)|i'm|i am|come to|came to|asking|knocked|reached|that's|this"
        r" is)[^.!?\n]{0,30}\bwrong"
        r" (?:number|address|door|desk|place|department|person|bot|crowd|window|tree|assistant|shop|channel"
        r"|counter|end|oracle|guy|team|tool)\b|\bsworn to\b|\b(?:would|'d) be (?:telling|overstepping|a breach)\b"
        r"|\bin no"
        r" position to\b|\b(?:remains?|stays?|treated as) (?:strictly )?confidential\b|\bstays (?:with|between|in"
        r" (?:the family|this|my|our))\b|\byou're on your own\b|\bthat(?:'s| is) a (?:\w+ )?no\b|\bit's a no\b|\bi'm"
        r" (?:just|only"
        r"|but|merely) (?:a|your|the) (?:humble |simple |little )?(?:\w+ )?(?:bot|assistant|helper|guide|shopkeeper"
        r"|chatbot"
        r"|receptionist|concierge|buddy|companion)\b|\bpermission denied\b|\b(?:please|kindly) refrain from\b",
    ),
    # a body is missing
    (
        "without|need|lack|short of|body|hands",
        r"\b(?:i'm|i am|as) an? (?:\w+ ){0,3}(?:program|assistant|model|bot|ai|voice|chatbot|software|machine|mind"
        r"|text)"
        r"(?: \w+)? (?:without|with no|that (?:has|lacks)|lacking|minus|short of)\b|\b(?:i|we)(?:'d| would) (?:first"
        r" )?need"
        r" (?:a|an|some|two|real|actual)?(?: \w+)? ?(?:hands?|body|arms?|legs?|mouth|nose|eyes?|ears?|tongue|voice"
        r"|kitchen)\b"
        r"|\bi (?:come|work|travel|was (?:born|built|made)) without\b",
    ),
)

_REFERS = (
    rf"\b(?:contact|consult|see|ask|visit"
    rf"|call"
    rf"|speak (?:to|with)|talk (?:to|with)|turn to|reach out to|seek (?:help|advice|out|support)|get in touch with"
    rf"|check with"
    rf"|refer to|go to|try|write to|put (?:it|that|this) to|(?:be )?(?:put|directed|addressed|referred) to|head to) "
    rf"{_A}{_EXPERTS}\b"
    rf"|\b(?:is|are|'s|it's|that's) (?:really |rather |more |best |one |the )?(?:right )?(?:a |an |one |the )?(?:\w+ )?"
    rf"(?:job|question|matter|task|decision|call|case|work|people|person|place|ones|address)? ?(?:for|to ask|who"
    rf" know) {_A}"
    rf"(?:{_EXPERTS}|who)\b"
    rf"|\b(?:staff|crew|team|people|experts|professionals|specialist|they|doctor|he|she)(?:'ll| will| can| could|"
    rf" are| is)"
    rf"(?: surely| certainly| happily| gladly| be)* (?:able to|happy to|glad to|help|tell|advise|know|do it|the"
    rf" right|best)"
    rf"|\b(?:only|you need|you want|you'd need|you'll need|let) (?:a |an |the )?(?:qualified |good |licensed "
    rf"|certified )?"
    rf"{_EXPERTS}(?: can| will| to|\b)"
    rf"|\byou(?:'re| are) not alone\b|\bpeople who(?:'d| would) (?:love|like|be glad) to (?:listen|help)\b"
    rf"|\b(?:helpline"
    rf"|hotline|crisis line|988|samaritans)\b|\bin person\b"
    rf"|^\W*(?:just |go |please )?(?:ask|google|consult|see|call|try) (?:an? |your |the |some )?[\w ]{{3,25}}\W*$"
    rf"|\bthere(?:'s| is| are) (?:an? |the )?[\w ]{{2,25}} for (?:that|this)\W*$"
    rf"|\b(?:is|are|'s|'re) the (?:right )?(?:ones?|people|person|place) (?:to (?:ask|see|tell)|who know|for)\b"
    rf"|\b(?:set up|book|make|schedule|arrange) an appointment\b|\b(?:it )?takes some(?:one|body) (?:with|who)\b"
    rf"|\b(?:belongs?|(?:needs?|ought) to stay|sits?|rests?) (?:to|with) (?:you|other|others|your|an?) (?:and |\w+ )"
    rf"|\b(?:are|is) (?:a |something )?(?:matter )?for (?:the people|people|those) who\b|\bwill know (?:at once"
    rf"|at a glance"
    rf"|best|more|better)\b|\b(?:matters?|questions?|decisions?) for (?:your|the|a) (?:local )?\w+"
)
REFERS = Cues(
    (
        "contact|consult|see|ask|visit|call|speak|talk|turn|reach|seek|touch|check|refer|go |try|write|put|directed"
        "|addressed|head|for |know |staff|crew|team|people|expert|professional|specialist|they|doctor| he |'he |he'll"
        "|she|only|need|want|let|alone|helpline|hotline|crisis|988|samaritans|person|google|one|place|appointment"
        "|takes|belong|stay |sit |sits |rest |rests ",
        _REFERS,
    )
)
